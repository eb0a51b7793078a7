# SPDX-License-Identifier: Apache-2.0
"""Arrays from numpy's own files, without a pickle: a pickle runs code."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from client_sdk.errors import DataError

# What numpy and zipfile raise for files that are broken, encrypted, or announce what is not there.
_BROKEN = (
    ValueError,
    EOFError,
    OSError,
    MemoryError,
    NotImplementedError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


def read_npy(path: Path) -> np.ndarray:
    """The array of a .npy file. Raises: DataError."""
    with _refused(path), path.open("rb") as file:
        loaded = np.load(file, allow_pickle=False)
        if not isinstance(loaded, np.ndarray):
            raise DataError(f"{path}: expected one array, found an archive; name it .npz")
        return loaded


def read_npz(path: Path, *, only: Collection[str] = ()) -> dict[str, np.ndarray]:
    """The arrays of a .npz file by name; with `only` those and no others.

    Raises: DataError for a file that cannot be read, or lacks one of `only`.
    """
    # Opened here: numpy leaves a file that is no archive open.
    with _refused(path), path.open("rb") as file:
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise DataError(f"{path}: expected arrays by name, found one array; name it .npy")
        with loaded:
            for name in only:
                if name not in loaded.files:
                    found = ", ".join(loaded.files) or "nothing"
                    raise DataError(f'{path}: expected an array "{name}", found {found}')
            return {name: loaded[name] for name in only or loaded.files}


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    try:
        yield
    except _BROKEN as error:
        raise DataError(f"{path}: expected a numpy file of numbers: {error}") from error
