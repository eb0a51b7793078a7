# SPDX-License-Identifier: Apache-2.0
"""The files of a bundle: names that cannot leave its folder, sizes and hashes."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from protocol import _checks
from protocol.errors import ManifestError
from protocol.limits import MAX_FILE_BYTES, MAX_FILES, MAX_PATH_LENGTH

MANIFEST_NAME: Final = "manifest.json"
SIGNATURE_NAME: Final = "manifest.sig"
SIGNER_NAME: Final = "signer.pub"
ENVELOPE: Final = (MANIFEST_NAME, SIGNATURE_NAME, SIGNER_NAME)
"""The files of a bundle that its manifest does not list."""
BACKBONE_FILE: Final = "backbone.safetensors"
"""Frozen weights, once for all graphs of a bundle."""
INITIAL_FILE: Final = "initial.safetensors"
"""The trainable tensors before the first round."""
PREDICT_FILE: Final = "predict.safetensors"
"""The weights of the graph that predicts which depend on the adapter."""
TOKENIZER_FILE: Final = "tokenizer.json"
"""Of a text backbone: from texts to the tokens that it was trained with."""
TOKENIZER_SETTINGS: Final = "tokenizer_config.json"
"""Beside it, where a backbone has one: which token pads."""

_PART: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


def result_of(job: str) -> str:
    """The name, 64 hex digits like a job's, under which a job's predicting bundle is fetched."""
    return hashlib.sha256(b"fedloom result\0" + job.encode("ascii")).hexdigest()


@dataclass(frozen=True, slots=True)
class FileEntry:
    """What a file must be."""

    sha256: str  # 64 hex digits
    size: int  # bytes

    def __post_init__(self) -> None:
        _checks.hexadecimal("sha256", self.sha256, 64, 64, ManifestError)
        size = _checks.integer("size", self.size, 0, MAX_FILE_BYTES, ManifestError)
        object.__setattr__(self, "size", size)


def plain_path(field: str, value: object) -> str:
    """A relative path of plain names (`a-b_1.onnx`, `folder/c`), the same on every system.

    Letters, digits, `.`, `_` and `-` only, no name starts with `.` or `-`: that leaves out `..`,
    absolute paths, backslashes, drives, streams and hidden files at once.
    """
    path = _checks.text(field, value, MAX_PATH_LENGTH, ManifestError)
    parts = path.split("/")
    if not all(_PART.fullmatch(part) and not part.endswith(".") for part in parts):
        raise ManifestError(
            f"{field}: expected a plain relative path inside the bundle "
            f"(letters, digits, . _ -), found {_checks.shown(path)}"
        )
    return path


def hash_files(folder: Path | str) -> dict[str, FileEntry]:
    """Size and SHA-256 of every file under `folder` by its path there, the envelope left out.

    Raises: ManifestError for a link, a special file, a name that `plain_path` refuses, or more
    than MAX_FILES files.
    """
    return {
        name: hash_file(Path(folder) / name) for name in list_files(folder) if name not in ENVELOPE
    }


def list_files(folder: Path | str) -> list[str]:
    """Sorted paths of all regular files under `folder`. Raises: ManifestError, as `hash_files`."""
    names: list[str] = []
    pending = [""]
    while pending:
        prefix = pending.pop()
        with os.scandir(Path(folder) / prefix) as entries:
            for entry in entries:
                name = plain_path("file name", prefix + entry.name)
                if entry.is_symlink():
                    raise ManifestError(f"{name}: expected a file, found a link; copy its target")
                if entry.is_dir(follow_symlinks=False):
                    pending.append(name + "/")
                elif entry.is_file(follow_symlinks=False):
                    names.append(name)
                else:
                    raise ManifestError(f"{name}: expected a file, found a special file")
                if len(names) + len(pending) > MAX_FILES:
                    raise ManifestError(f"expected at most {MAX_FILES} files in {folder}")
    return sorted(names)


def hash_file(path: Path) -> FileEntry:
    """Size and SHA-256 of one regular file; a link is refused. Raises: ManifestError."""
    descriptor = open_regular(path)
    with os.fdopen(descriptor, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(digest, file.tell())


def read_small(path: Path, limit: int) -> bytes:
    """The bytes of a file of at most `limit` bytes; a link is refused. Raises: ManifestError."""
    with os.fdopen(open_regular(path), "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ManifestError(f"{path.name}: expected at most {limit} bytes, found more")
    return data


def open_regular(path: Path) -> int:
    """A descriptor of a regular file, never through a link and never waiting on a pipe."""
    flags = os.O_RDONLY
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY", "O_CLOEXEC"):
        flags |= getattr(os, name, 0)  # each is missing on some system
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        raise ManifestError(f"{path.name}: cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ManifestError(f"{path.name}: expected a regular file")
    return descriptor
