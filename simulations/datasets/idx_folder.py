# SPDX-License-Identifier: Apache-2.0
"""Any folder with the four IDX files that MNIST and its kin are published as."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from simulations.datasets.dataset import Dataset
from simulations.datasets.idx import read_idx
from simulations.errors import DataError

FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
CLASSES_FILE = "classes.txt"


def load_idx_folder(folder: Path) -> Dataset:
    """Reads the four files, each plain or with `.gz`.

    The classes are 0 to the largest training label, or one a line of `classes.txt` where the
    folder has that file.

    Raises: DataError with file, expected and found.
    """
    train, train_labels_file = _load_part(folder, "train")
    test, test_labels_file = _load_part(folder, "test")
    names = _class_names(folder) or tuple(str(i) for i in range(int(train["labels"].max()) + 1))
    for file, labels in ((train_labels_file, train["labels"]), (test_labels_file, test["labels"])):
        beyond = np.flatnonzero(labels >= len(names))
        if len(beyond):
            raise DataError(
                f"{file}: expected labels 0 to {len(names) - 1}, found {labels[beyond[0]]} at "
                f"example {beyond[0]}"
            )
    return Dataset(name=folder.name, kind="image", train=train, test=test, class_names=names)


def _load_part(folder: Path, part: str) -> tuple[dict[str, np.ndarray], Path]:
    images_file, labels_file = (_existing(folder, name) for name in FILES[part])
    images, labels = _read(images_file), _read(labels_file)
    if images.dtype != np.uint8 or images.ndim != 3 or 0 in images.shape[1:]:
        raise DataError(
            f"{images_file}: expected uint8 images [n, height, width], found {images.dtype} "
            f"{images.shape}"
        )
    if labels.dtype != np.uint8 or labels.ndim != 1:
        raise DataError(
            f"{labels_file}: expected uint8 labels [n], found {labels.dtype} {labels.shape}"
        )
    if len(images) == 0:
        raise DataError(f"{images_file}: expected at least one image, found none")
    if len(labels) != len(images):
        raise DataError(
            f"{labels_file}: expected {len(images)} labels, one for each image of "
            f"{images_file.name}, found {len(labels)}"
        )
    return {"images": images, "labels": labels.astype(np.int64)}, labels_file


def _read(file: Path) -> np.ndarray:
    try:
        return read_idx(file)
    except (OSError, ValueError) as error:  # both name the file
        raise DataError(str(error)) from error


def _existing(folder: Path, name: str) -> Path:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise DataError(f"{folder}: expected {name} or {name}.gz, found neither")


def _class_names(folder: Path) -> tuple[str, ...]:
    file = folder / CLASSES_FILE
    if not file.is_file():
        return ()
    try:
        names = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: expected UTF-8 text, found {error}") from error
    if not names or "" in names or len(set(names)) != len(names):
        raise DataError(f"{file}: expected one class name a line, none empty, none twice")
    return names
