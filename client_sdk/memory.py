# SPDX-License-Identifier: Apache-2.0
"""What a client keeps for itself between rounds: the part of an update that a codec left behind.

One file a kind and round, `residual-12.safetensors`: written whole or not at all, the newest two
kept. A round that is played again, after a crash of either side, starts from what was there before
it, and so gives the same bits.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final, Protocol

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from client_sdk.durable import make_folder
from client_sdk.errors import MemoryFileError
from protocol.owned_files import PARTIAL, write_whole
from protocol.tensors import Tensors

KEPT_ROUNDS: Final = 2

_SUFFIX: Final = ".safetensors"


class ClientMemory(Protocol):
    """One client's own tensors, by kind and round."""

    def latest(self, kind: str, *, before: int) -> dict[str, np.ndarray]:
        """What the latest round below `before` left; {} if none did."""
        ...

    def of_round(self, kind: str, round: int) -> dict[str, np.ndarray]:
        """What that round left; {} if it left nothing, or that was let go."""
        ...

    def save(self, kind: str, round: int, tensors: Tensors) -> None:
        """Keep what a round leaves. A second save of the same round replaces the first."""
        ...


class FolderMemory:
    """A client's memory in a folder of its own, for one process at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @classmethod
    def of(cls, folder: Path, client: str) -> FolderMemory:
        """The memory of one of many clients that share `folder`; any name is a safe one."""
        return cls(folder / hashlib.sha256(client.encode()).hexdigest()[:32])

    def latest(self, kind: str, *, before: int) -> dict[str, np.ndarray]:
        """Raises: MemoryFileError for a file that cannot be read."""
        known = [number for number in self._rounds(kind) if number < before]
        return self.of_round(kind, max(known)) if known else {}

    def of_round(self, kind: str, round: int) -> dict[str, np.ndarray]:
        """Raises: MemoryFileError for a file that cannot be read."""
        path = self._path(kind, round)
        if not path.exists():
            return {}
        try:
            return dict(load_file(path))
        except (OSError, SafetensorError) as error:
            raise MemoryFileError(
                f"{path}: expected what an earlier round left, it cannot be read ({error}); remove "
                "the file to go on without it"
            ) from error

    def save(self, kind: str, round: int, tensors: Tensors) -> None:
        """Durable when it returns. Raises: MemoryFileError when it cannot be written."""
        path = self._path(kind, round)
        try:
            make_folder(self._folder)
            write_whole(path, save(dict(tensors)))
            for old in sorted(n for n in self._rounds(kind) if n <= round)[:-KEPT_ROUNDS]:
                self._path(kind, old).unlink(missing_ok=True)
            # What a writer left that was killed in a round that was not played again.
            for left in self._folder.glob(f".{kind}-*{_SUFFIX}.*{PARTIAL}"):
                left.unlink(missing_ok=True)
        except OSError as error:
            raise MemoryFileError(
                f"{path}: cannot be written ({error.strerror or error}); make room or set the "
                "folder's owner right"
            ) from error

    def _path(self, kind: str, round: int) -> Path:
        return self._folder / f"{kind}-{round}{_SUFFIX}"

    def _rounds(self, kind: str) -> list[int]:
        numbers = (
            path.name.removesuffix(_SUFFIX).removeprefix(f"{kind}-")
            for path in self._folder.glob(f"{kind}-*{_SUFFIX}")
        )
        return [int(number) for number in numbers if number.isdecimal()]
