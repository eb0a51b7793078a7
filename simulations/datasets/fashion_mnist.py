# SPDX-License-Identifier: Apache-2.0
"""Fashion-MNIST, cut by name into a public half, a private half and the test set.

*Source*: Xiao, Rasul and Vollgraf, "Fashion-MNIST", 2017, arXiv:1708.07747; MIT licence.

The shipped vision backbone has seen the public half with its labels. A federation holds the
private half. The cut is made here and nowhere else, so that the two cannot mix.
"""

from pathlib import Path
from typing import Literal

import numpy as np

from client_sdk.data.idx import IdxFormatError, read_idx

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
IMAGE_SHAPE = (28, 28)
N_CLASSES = 10
Split = Literal["public", "private", "test"]


def load_fashion_mnist(
    folder: Path | None = None, split: Split = "private"
) -> tuple[np.ndarray, np.ndarray]:
    """Load one split from a folder of IDX files, each plain or `.gz`.

    `private` is the first half of the training images (0 to 29,999 in the real one), `public`
    the second (30,000 to 59,999), `test` the ten thousand test images.

    *Returns*: images uint8 `[n, 28, 28]`, labels int64 `[n]` in 0..9.
    *Raises*: `FileNotFoundError` if a file is missing, `IdxFormatError` if one is damaged,
    `ValueError` for an unknown split.
    """
    if split not in ("public", "private", "test"):
        raise ValueError(f"split is {split!r}; allowed are 'public', 'private', 'test'")
    folder = DEBIAN_FOLDER if folder is None else Path(folder)
    stem = "t10k" if split == "test" else "train"
    image_path = _find(folder, f"{stem}-images-idx3-ubyte")
    label_path = _find(folder, f"{stem}-labels-idx1-ubyte")
    images, labels = read_idx(image_path), read_idx(label_path)
    if images.dtype != np.uint8 or images.shape[1:] != IMAGE_SHAPE:
        raise IdxFormatError(
            f"{image_path}: expected uint8 images [n, 28, 28], found {images.dtype} "
            f"{list(images.shape)}"
        )
    if labels.dtype != np.uint8 or labels.shape != images.shape[:1]:
        raise IdxFormatError(
            f"{label_path}: expected one uint8 label for each of {len(images)} images, found "
            f"{labels.dtype} {list(labels.shape)}"
        )
    if len(labels) and labels.max() >= N_CLASSES:
        raise IdxFormatError(
            f"{label_path}: expected labels 0 to {N_CLASSES - 1}, found {labels.max()}"
        )
    labels = labels.astype(np.int64)
    if split == "test":
        return images, labels
    half = len(images) // 2
    part = slice(half, None) if split == "public" else slice(None, half)
    return images[part], labels[part]


def _find(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{folder / name}[.gz] is missing; install it with `apt-get install "
        "dataset-fashion-mnist`, or name a folder that holds the four IDX files"
    )
