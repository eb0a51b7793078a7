# SPDX-License-Identifier: Apache-2.0
"""A data set as named arrays, and the one place where names become data sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from simulations.errors import DataError

Arrays = Mapping[str, np.ndarray]

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
TEXT_KEYS = frozenset({"texts"})
TOKEN_KEYS = frozenset({"input_ids", "attention_mask"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Raw examples, before a model's preprocessing.

    Shapes: "labels" int64 [n]; images "images" uint8 [n, h, w] or [n, h, w, 1 or 3];
    texts "texts" object [n] of str, after `tokenise` "input_ids" and "attention_mask" int64 [n, t].
    `groups` [n_train] names who each training example came from, for the natural partition.

    Raises: DataError when the arrays contradict this.
    """

    name: str
    kind: Literal["image", "text"]
    train: Arrays
    test: Arrays
    class_names: tuple[str, ...]
    groups: np.ndarray | None = None

    def __post_init__(self) -> None:
        for part, arrays in (("train", self.train), ("test", self.test)):
            _check_part(f"{self.name}, {part}", self.kind, arrays, len(self.class_names))
        expected = {key: array.shape[1:] for key, array in self.train.items()}
        found = {key: array.shape[1:] for key, array in self.test.items()}
        if expected != found:
            raise DataError(
                f"{self.name}: expected test arrays shaped like the training arrays "
                f"{expected}, found {found}"
            )
        samples = len(self.train["labels"])
        if self.groups is not None and self.groups.shape != (samples,):
            raise DataError(
                f"{self.name}: expected one group for each of {samples} training examples, "
                f"found groups of shape {self.groups.shape}"
            )


def _check_part(where: str, kind: str, arrays: Arrays, classes: int) -> None:
    labels = arrays.get("labels")
    if labels is None or labels.ndim != 1 or labels.dtype != np.int64:
        raise DataError(f'{where}: expected "labels" as int64 [n]')
    if len(labels) == 0:
        raise DataError(f"{where}: expected at least one example, found none")
    if labels.min() < 0 or labels.max() >= classes:
        bad = int(np.flatnonzero((labels < 0) | (labels >= classes))[0])
        raise DataError(
            f"{where}: expected labels 0 to {classes - 1} for {classes} classes, "
            f"found {labels[bad]} at example {bad}"
        )
    for key, array in arrays.items():
        if array.ndim == 0 or len(array) != len(labels):
            raise DataError(
                f'{where}: expected {len(labels)} rows in "{key}", one a label, '
                f"found shape {array.shape}"
            )
    inputs = set(arrays) - {"labels"}
    if kind == "image":
        images = arrays.get("images")
        if (
            inputs != {"images"}
            or images is None
            or images.dtype != np.uint8
            or not (images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3)))
            or 0 in images.shape[1:3]
        ):
            raise DataError(
                f'{where}: expected "images" as uint8 [n, height, width] or [n, height, width, '
                f"1 or 3], found {_described(arrays)}"
            )
    elif kind == "text":
        if inputs not in (TEXT_KEYS, TOKEN_KEYS):
            raise DataError(
                f'{where}: expected "texts", or "input_ids" and "attention_mask", '
                f"found {_described(arrays)}"
            )
    else:
        raise DataError(f'{where}: expected kind "image" or "text", found "{kind}"')


def _described(arrays: Arrays) -> str:
    return ", ".join(f'"{key}" {array.dtype} {array.shape}' for key, array in arrays.items())


def take(arrays: Arrays, indices: np.ndarray) -> dict[str, np.ndarray]:
    """The rows `indices` of every array, copied."""
    return {key: array[indices] for key, array in arrays.items()}


def stratified_split(
    labels: np.ndarray, fraction: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Splits each class apart, so that the test part has the classes in the same proportions.

    Returns: sorted indices (train, test); a class of one example stays in train, a larger one
    gives at least one to each part.
    """
    test: list[np.ndarray] = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        count = min(max(1, round(len(members) * fraction)), len(members) - 1)
        test.append(members[:count])
    held = np.sort(np.concatenate(test))
    return np.setdiff1d(np.arange(len(labels)), held), held


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
            from simulations.datasets.digits import load_digits_dataset

            dataset = load_digits_dataset()
        case "fashion-mnist":
            dataset = _fashion_mnist()
        case "debian-descriptions":
            from simulations.datasets.debian_descriptions import load_debian_descriptions

            dataset = load_debian_descriptions(seed=seed)
        case _:
            dataset = _load_folder(Path(name_or_folder), seed=seed)
    return _limited(dataset, max_train=max_train, max_test=max_test, seed=seed)


def _fashion_mnist() -> Dataset:
    """The private half of the training images; the shipped backbone has seen the public one."""
    from simulations.datasets.fashion_mnist import load_fashion_mnist

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
    entries = list(folder.iterdir())
    if any("-idx" in entry.name and "-ubyte" in entry.name for entry in entries):
        from simulations.datasets.idx_folder import load_idx_folder

        return load_idx_folder(folder)
    if any(entry.suffix == ".jsonl" for entry in entries):
        from simulations.datasets.jsonl_folder import load_jsonl_folder

        return load_jsonl_folder(folder, seed=seed)
    if any(entry.is_dir() and not entry.name.startswith(".") for entry in entries):
        from simulations.datasets.image_folder import load_image_folder

        return load_image_folder(folder, seed=seed)
    found = ", ".join(sorted(entry.name for entry in entries)[:5]) or "nothing"
    raise DataError(
        f"{folder}: expected IDX files (train-images-idx3-ubyte, ...), *.jsonl or class subfolders "
        f"of images, found {found}"
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
