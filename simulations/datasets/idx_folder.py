# SPDX-License-Identifier: Apache-2.0
"""Any folder with the four IDX files that MNIST and its kin are published as."""

from __future__ import annotations

from pathlib import Path

from client_sdk.data.idx_folder import check_labels, read_class_names, read_pair
from simulations.datasets.dataset import Dataset


def load_idx_folder(folder: Path) -> Dataset:
    """Reads the four files, each plain or with `.gz`.

    The classes are 0 to the largest training label, or one a line of `classes.txt` where the
    folder has that file.

    Raises: client_sdk.errors.DataError with file, expected and found.
    """
    train, train_labels_file = read_pair(folder, "train")
    test, test_labels_file = read_pair(folder, "test")
    names = read_class_names(folder) or tuple(str(i) for i in range(int(train["labels"].max()) + 1))
    for file, labels in ((train_labels_file, train["labels"]), (test_labels_file, test["labels"])):
        check_labels(labels, file, names)
    return Dataset(name=folder.name, kind="image", train=train, test=test, class_names=names)
