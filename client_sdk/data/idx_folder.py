# SPDX-License-Identifier: Apache-2.0
"""A folder with the IDX files that MNIST and its kin are published as: pairs of images and labels,
each file plain or with `.gz`."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

import numpy as np

from client_sdk.data.idx import read_idx
from client_sdk.errors import DataError

FILES: Final = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
CLASSES_FILE: Final = "classes.txt"


def read_pair(folder: Path, part: Literal["train", "test"]) -> tuple[dict[str, np.ndarray], Path]:
    """One pair: "images" uint8 [n, h, w] and "labels" int64 [n], and the file of the labels.

    Raises: DataError with file, expected and found.
    """
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


def has_part(folder: Path, part: Literal["train", "test"]) -> bool:
    """Whether a file of that pair is there."""
    return any((folder / name).is_file() for stem in FILES[part] for name in (stem, f"{stem}.gz"))


def read_class_names(folder: Path) -> tuple[str, ...]:
    """The lines of `classes.txt`; () without that file. Raises: DataError."""
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


def check_labels(labels: np.ndarray, file: Path, names: tuple[str, ...]) -> None:
    """Raises: DataError for a label that none of the names is for."""
    beyond = np.flatnonzero(labels >= len(names))
    if len(beyond):
        raise DataError(
            f"{file}: expected labels 0 to {len(names) - 1}, found {labels[beyond[0]]} at "
            f"example {beyond[0]}"
        )


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
