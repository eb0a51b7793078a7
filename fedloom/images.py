# SPDX-License-Identifier: Apache-2.0
"""Images that a command is given: one file of many, one image, or a folder of them. No torch."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Final

import numpy as np

from fedloom.errors import UsageError
from simulations.datasets.idx import IdxFormatError, read_idx
from simulations.datasets.image_folder import SUFFIXES, read_image

MANY: Final = (".npz", ".npy")


def read_images(path: Path) -> tuple[list[str], list[np.ndarray]]:
    """A name for every image, and the images in that order, in blocks of one size each.

    .npz with "images", .npy and IDX files hold uint8 [n, h, w] or [n, h, w, c] and are one block;
    their images are named by their number. PNG and JPEG files, alone or anywhere in a folder, are
    a block each (reading them needs Pillow) and named by their path.

    Raises:
        UsageError: no such file, or one of another kind.
        simulations.errors.DataError: an image that is broken, or Pillow is missing.
    """
    if path.is_dir():
        files = sorted(
            file
            for file in path.rglob("*")
            if file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
        if not files:
            raise UsageError(f"{path}: expected PNG or JPEG files, found an empty folder")
        return [str(file.relative_to(path)) for file in files], [_one(file) for file in files]
    if not path.is_file():
        raise UsageError(f"{path}: no such file or folder")
    if path.suffix.lower() in SUFFIXES:
        return [path.name], [_one(path)]
    if path.suffix.lower() in MANY:
        images = _from_numpy(path)
    elif "-idx" in path.name:
        try:
            images = read_idx(path)
        except IdxFormatError as error:
            raise UsageError(str(error)) from error
    else:
        known = ", ".join((*MANY, "IDX (NAME-idx3-ubyte)", *SUFFIXES))
        raise UsageError(f"{path}: expected a folder of images or one of {known}")
    if images.ndim < 3:
        raise UsageError(
            f"{path}: expected images [n, height, width] or [n, height, width, channels], found "
            f"{images.dtype} {list(images.shape)}"
        )
    return [str(number) for number in range(len(images))], [images]


def _one(file: Path) -> np.ndarray:
    return read_image(file)[None]


def _from_numpy(path: Path) -> np.ndarray:
    try:
        # Opened here: numpy leaves a file that is no archive open.
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)  # a pickle runs code
            if isinstance(loaded, np.ndarray):
                return loaded
            if "images" not in loaded:
                found = ", ".join(loaded.files) or "nothing"
                raise UsageError(f'{path}: expected an array "images", found {found}')
            images: np.ndarray = loaded["images"]
            return images
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path}: expected a numpy file of numbers: {error}") from error
