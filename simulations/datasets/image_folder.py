# SPDX-License-Identifier: Apache-2.0
"""A folder of images: one subfolder a class, or such folders inside `train/` and `test/`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from simulations.datasets.dataset import Dataset, stratified_split, take
from simulations.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg")
TEST_FRACTION = 0.2
GREY_MODES = ("1", "L")
COLOUR_MODES = ("RGB", "RGBA", "P", "LA", "CMYK", "YCbCr")


def load_image_folder(folder: Path, *, seed: int) -> Dataset:
    """Reads PNG and JPEG files, all of the first one's size.

    One colour image makes the whole data set [n, h, w, 3]; grey images are then repeated over the
    channels. Without `train/` and `test/` a stratified fifth, chosen by `seed`, is the test set.

    Raises: DataError with the file, what was expected and what was found.
    """
    folders = _subfolders(folder)
    if {"train", "test"} & set(folders):
        if set(folders) != {"train", "test"}:
            raise DataError(
                f'{folder}: expected "train" and "test" together and nothing beside them, '
                f"found {', '.join(folders)}"
            )
        names = tuple(_subfolders(folders["train"]))
        images, label_list, size = _read_classes(folders["train"], names, None)
        test_images, test_labels, _ = _read_classes(folders["test"], names, size)
        train = np.arange(len(images))
        test = len(images) + np.arange(len(test_images))
        images, label_list = images + test_images, label_list + test_labels
        labels = np.array(label_list, dtype=np.int64)
    else:
        names = tuple(folders)
        images, label_list, _ = _read_classes(folder, names, None)
        labels = np.array(label_list, dtype=np.int64)
        train, test = stratified_split(labels, TEST_FRACTION, np.random.default_rng([seed, 0x1496]))
    arrays = {"images": _stacked(images), "labels": labels}
    return Dataset(
        name=folder.name,
        kind="image",
        train=take(arrays, train),
        test=take(arrays, test),
        class_names=names,
    )


def _subfolders(folder: Path) -> dict[str, Path]:
    found = sorted(e for e in folder.iterdir() if e.is_dir() and not e.name.startswith("."))
    if not found:
        raise DataError(f"{folder}: expected a subfolder for each class, found none")
    return {entry.name: entry for entry in found}


def _read_classes(
    folder: Path, names: tuple[str, ...], size: tuple[int, int] | None
) -> tuple[list[np.ndarray], list[int], tuple[int, int]]:
    images: list[np.ndarray] = []
    labels: list[int] = []
    for name, subfolder in _subfolders(folder).items():
        if name not in names:
            raise DataError(
                f"{subfolder}: expected a class that the training images have "
                f"({', '.join(names)}), found {name}"
            )
        files = sorted(e for e in subfolder.iterdir() if not e.name.startswith("."))
        if not files:
            raise DataError(f"{subfolder}: expected at least one image, found an empty folder")
        for file in files:
            image = read_image(file)
            size = size or image.shape[:2]
            if image.shape[:2] != size:
                raise DataError(
                    f"{file}: expected {size[1]}×{size[0]} pixels like the first image, found "
                    f"{image.shape[1]}×{image.shape[0]}; resize the images to one size first"
                )
            images.append(image)
            labels.append(names.index(name))
    if size is None:
        raise DataError(f"{folder}: expected images, found none")
    return images, labels, size


def read_image(file: Path) -> np.ndarray:
    """One PNG or JPEG file: uint8 [h, w], or [h, w, 3] in colour. Raises: DataError."""
    if file.suffix.lower() not in SUFFIXES or not file.is_file():
        raise DataError(f"{file}: expected a PNG or JPEG file; move anything else away")
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise DataError(
            f"{file}: expected Pillow to read images; install it with: pip install pillow"
        ) from error
    try:
        with Image.open(file, formats=("PNG", "JPEG")) as image:
            if image.mode in GREY_MODES:
                return np.asarray(image.convert("L"))
            if image.mode in COLOUR_MODES:
                return np.asarray(image.convert("RGB"))
            mode = image.mode
    except (
        UnidentifiedImageError,
        Image.DecompressionBombError,
        OSError,
        SyntaxError,
        ValueError,
    ) as error:
        raise DataError(f"{file}: expected a whole PNG or JPEG image, found {error}") from error
    raise DataError(f"{file}: expected 8 bits a channel, grey or colour, found PIL mode {mode}")


def _stacked(images: list[np.ndarray]) -> np.ndarray:
    """[n, h, w] when all are grey, otherwise [n, h, w, 3]."""
    if all(image.ndim == 2 for image in images):
        return np.stack(images)
    return np.stack([np.repeat(im[:, :, None], 3, axis=2) if im.ndim == 2 else im for im in images])
