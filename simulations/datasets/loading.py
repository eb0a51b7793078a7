# SPDX-License-Identifier: Apache-2.0
"""The one place where names and folders become data sets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from client_sdk.data.folders import entries_of, kind_of_folder
from client_sdk.errors import DataError as SourceError
from simulations.datasets.dataset import Dataset, take
from simulations.datasets.debian_descriptions import load_debian_descriptions
from simulations.datasets.digits import load_digits_dataset
from simulations.datasets.fashion_mnist import load_fashion_mnist
from simulations.datasets.idx_folder import load_idx_folder
from simulations.datasets.image_folder import load_image_folder
from simulations.datasets.jsonl_folder import load_jsonl_folder
from simulations.errors import DataError

DATASET_NAMES = ("digits", "fashion-mnist", "debian-descriptions")
FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def load_dataset(
    name_or_folder: str | Path, *, seed: int, max_train: int = 0, max_test: int = 0
) -> Dataset:
    """Loads a data set by name, or a folder of IDX files, images or jsonl.

    `seed` decides the test split where the source has none, and which examples are kept under
    `max_train` and `max_test` (0 keeps all).

    Raises: DataError for an unknown name, a missing folder or unusable contents.
    """
    if max_train < 0 or max_test < 0:
        raise DataError(
            "expected max_train and max_test of at least 0 (0 keeps all), "
            f"found {max_train} and {max_test}"
        )
    match name_or_folder:
        case "digits":
            dataset = load_digits_dataset()
        case "fashion-mnist":
            dataset = _fashion_mnist()
        case "debian-descriptions":
            dataset = load_debian_descriptions(seed=seed)
        case _:
            dataset = _load_folder(Path(name_or_folder), seed=seed)
    return _limited(dataset, max_train=max_train, max_test=max_test, seed=seed)


def _fashion_mnist() -> Dataset:
    """The private half of the training images; the shipped backbone has seen the public one."""
    try:
        images, labels = load_fashion_mnist(split="private")
        test_images, test_labels = load_fashion_mnist(split="test")
    except (OSError, ValueError) as error:
        raise DataError(f"fashion-mnist: {error}") from error
    return Dataset(
        name="fashion-mnist",
        kind="image",
        train={"images": images, "labels": labels},
        test={"images": test_images, "labels": test_labels},
        class_names=FASHION_CLASSES,
    )


def _load_folder(folder: Path, *, seed: int) -> Dataset:
    if not folder.is_dir():
        raise DataError(
            f'data set "{folder}": expected one of {", ".join(DATASET_NAMES)}, or an existing '
            "folder of IDX files, class subfolders of images, or jsonl"
        )
    try:
        match kind_of_folder(folder):
            case "idx":
                return load_idx_folder(folder)
            case "jsonl":
                return load_jsonl_folder(folder, seed=seed)
            case "images":
                return load_image_folder(folder, seed=seed)
    except SourceError as error:
        raise DataError(str(error)) from error
    raise DataError(
        f"{folder}: expected IDX files (train-images-idx3-ubyte, ...), *.jsonl or class subfolders "
        f"of images, found {entries_of(folder)}"
    )


def _limited(dataset: Dataset, *, max_train: int, max_test: int, seed: int) -> Dataset:
    rng = np.random.default_rng([seed, 0x11417])
    train, test, groups = dataset.train, dataset.test, dataset.groups
    if 0 < max_train < len(train["labels"]):
        kept = np.sort(rng.choice(len(train["labels"]), max_train, replace=False))
        train = take(train, kept)
        groups = None if groups is None else groups[kept]
    if 0 < max_test < len(test["labels"]):
        test = take(test, np.sort(rng.choice(len(test["labels"]), max_test, replace=False)))
    return replace(dataset, train=train, test=test, groups=groups)
