# SPDX-License-Identifier: Apache-2.0
"""Folders of one user that survive a power cut, and a lock between processes."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from protocol.owned_files import sync_folder

_FILE_MODE: Final = 0o600
_FOLDER_MODE: Final = 0o700


def make_folder(folder: Path) -> None:
    """Durably, with its parents where they are missing; for this user alone. Raises: OSError."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(mode=_FOLDER_MODE, exist_ok=True)
    sync_folder(folder.parent)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes, by a file of its own; it ends with the process that holds it.

    Not for one thread twice: it would wait for itself. Raises: OSError.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, _FILE_MODE)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock just now. Raises: OSError."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, _FILE_MODE)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
