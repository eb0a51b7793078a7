# SPDX-License-Identifier: Apache-2.0
"""Images from PNG and JPEG files, and folders of them: one subfolder a class."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np

from client_sdk.errors import DataError

SUFFIXES: Final = (".png", ".jpg", ".jpeg")
GREY_MODES: Final = ("1", "L")
COLOUR_MODES: Final = ("RGB", "RGBA", "P", "LA", "CMYK", "YCbCr")


def subfolders(folder: Path) -> dict[str, Path]:
    """By name, in order; hidden ones are left out. Raises: DataError where there is none."""
    found = sorted(e for e in folder.iterdir() if e.is_dir() and not e.name.startswith("."))
    if not found:
        raise DataError(f"{folder}: expected a subfolder for each class, found none")
    return {entry.name: entry for entry in found}


def read_classes(folder: Path) -> Iterator[tuple[str, Path, np.ndarray]]:
    """Class name, file and pixels of every image of a folder's class subfolders, in order.

    Raises: DataError for a class without images, and as `read_image`.
    """
    for name, subfolder in subfolders(folder).items():
        files = sorted(e for e in subfolder.iterdir() if not e.name.startswith("."))
        if not files:
            raise DataError(f"{subfolder}: expected at least one image, found an empty folder")
        for file in files:
            yield name, file, read_image(file)


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
