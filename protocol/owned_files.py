# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole or not at all, and private ones that their owner alone may read."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Final

from protocol.errors import ManifestError, SignatureError
from protocol.files import open_regular

PRIVATE: Final = 0o600
PUBLIC: Final = 0o644
PARTIAL: Final = ".partial"


def write_whole(
    path: Path, *parts: bytes | memoryview, mode: int = PRIVATE, replace: bool = True
) -> None:
    """Durable when it returns; a crash leaves the old file or the new one.

    `mode` is the new file's, less what the process's umask takes away. A writer that is killed may
    leave a second file beside it; see `partial_files`.

    Raises: FileExistsError where a file must not be replaced; OSError when it cannot be written,
        and the file is then as it was, or whole and new.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            os.replace(partial, path)
        else:
            os.link(partial, path)  # unlike a rename it fails where there is a file
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def partial_files(path: Path) -> list[Path]:
    """What writers of this file left that were killed; also what one is writing just now."""
    return sorted(path.parent.glob(f".{path.name}.*{PARTIAL}"))


def read_private(path: Path, limit: int) -> bytes:
    """A file of at most `limit` bytes. Raises: SignatureError, also if others may read it."""
    try:
        descriptor = open_regular(path)
    except ManifestError as error:
        raise SignatureError(f"private key {path}: {error}") from None
    with os.fdopen(descriptor, "rb") as file:
        # of the file that is open, not of what may stand at its path by now
        mode = os.fstat(file.fileno()).st_mode & 0o777
        if os.name == "posix" and mode & 0o077:
            raise SignatureError(
                f"private key {path}: expected mode 600, found {mode:o}; run chmod 600 on it, "
                "and replace the key if others may have read it"
            )
        data = file.read(limit + 1)
    if len(data) > limit:
        raise SignatureError(f"private key {path}: expected at most {limit} bytes, found more")
    return data


def sync_folder(folder: Path) -> None:
    """Makes names that came, changed or went in it survive a power cut. Raises: OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
