# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole or not at all, whenever a process or the machine stops."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

PARTIAL: Final = ".partial"

_FILE_MODE: Final = 0o600
_FOLDER_MODE: Final = 0o700


def make_folder(folder: Path) -> None:
    """Durably, with its parents where they are missing; for this user alone. Raises: OSError."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(mode=_FOLDER_MODE, exist_ok=True)
    sync_folder(folder.parent)


def write_whole(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file, or replace it, for this user alone; durable when it returns.

    One writer a path at a time. One that is killed leaves the file as it was, and perhaps a second
    one beside it that ends in `PARTIAL`.

    Raises: OSError; the file is then as it was, or whole and new.
    """
    partial = path.with_name(path.name + PARTIAL)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(partial, flags, _FILE_MODE), "wb") as file:
            os.fchmod(file.fileno(), _FILE_MODE)  # it may have been left by another umask
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        # A full disk needs the room, and a reader no half of a file.
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make names that were added, changed or removed in a folder durable. Raises: OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
