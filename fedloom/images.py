# SPDX-License-Identifier: Apache-2.0
"""Images that a command is given: one file of many, one image, or a folder of them. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from client_sdk.data.idx import IdxFormatError, read_idx
from client_sdk.data.image_folder import SUFFIXES, read_image
from client_sdk.data.numpy_files import read_npy, read_npz
from fedloom.errors import UsageError

MANY: Final = (".npz", ".npy")


def read_images(path: Path) -> tuple[list[str], list[np.ndarray]]:
    """A name for every image, and the images in that order, in blocks of one size each.

    .npz with "images", .npy and IDX files hold uint8 [n, h, w] or [n, h, w, c] and are one block;
    their images are named by their number. PNG and JPEG files, alone or anywhere in a folder, are
    a block each (reading them needs Pillow) and named by their path.

    Raises:
        UsageError: no such file, or one of another kind.
        client_sdk.errors.DataError: a file that is broken, or Pillow is missing.
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
    if path.suffix.lower() == ".npz":
        images = read_npz(path, only=("images",))["images"]
    elif path.suffix.lower() == ".npy":
        images = read_npy(path)
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
