# SPDX-License-Identifier: Apache-2.0
"""A folder of images: one subfolder a class, or such folders inside `train/` and `test/`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from client_sdk.data.image_folder import read_classes, subfolders
from simulations.datasets.dataset import Dataset, stratified_split, take
from simulations.errors import DataError

TEST_FRACTION = 0.2


def load_image_folder(folder: Path, *, seed: int) -> Dataset:
    """Reads PNG and JPEG files, all of the first one's size.

    One colour image makes the whole data set [n, h, w, 3]; grey images are then repeated over the
    channels. Without `train/` and `test/` a stratified fifth, chosen by `seed`, is the test set.

    Raises: DataError, of this package or of client_sdk, with the file, what was expected and what
    was found.
    """
    folders = subfolders(folder)
    if {"train", "test"} & set(folders):
        if set(folders) != {"train", "test"}:
            raise DataError(
                f'{folder}: expected "train" and "test" together and nothing beside them, '
                f"found {', '.join(folders)}"
            )
        names = tuple(subfolders(folders["train"]))
        images, label_list, size = _read_part(folders["train"], names, None)
        test_images, test_labels, _ = _read_part(folders["test"], names, size)
        train = np.arange(len(images))
        test = len(images) + np.arange(len(test_images))
        images, label_list = images + test_images, label_list + test_labels
        labels = np.array(label_list, dtype=np.int64)
    else:
        names = tuple(folders)
        images, label_list, _ = _read_part(folder, names, None)
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


def _read_part(
    folder: Path, names: tuple[str, ...], size: tuple[int, ...] | None
) -> tuple[list[np.ndarray], list[int], tuple[int, ...] | None]:
    images: list[np.ndarray] = []
    labels: list[int] = []
    for name, file, image in read_classes(folder):
        if name not in names:
            raise DataError(
                f"{file.parent}: expected a class that the training images have "
                f"({', '.join(names)}), found {name}"
            )
        size = size or image.shape[:2]
        if image.shape[:2] != size:
            raise DataError(
                f"{file}: expected {size[1]}×{size[0]} pixels like the first image, found "
                f"{image.shape[1]}×{image.shape[0]}; resize the images to one size first"
            )
        images.append(image)
        labels.append(names.index(name))
    return images, labels, size


def _stacked(images: list[np.ndarray]) -> np.ndarray:
    """[n, h, w] when all are grey, otherwise [n, h, w, 3]."""
    if all(image.ndim == 2 for image in images):
        return np.stack(images)
    return np.stack([np.repeat(im[:, :, None], 3, axis=2) if im.ndim == 2 else im for im in images])
