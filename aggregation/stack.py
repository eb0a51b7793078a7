# SPDX-License-Identifier: Apache-2.0
"""A round's updates kept side by side, for rules that must see all of them at once.

In memory up to a budget, and in a temporary file without a name beyond it: a round of many clients
takes disk, not memory, and leaves nothing behind when the process dies.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import IO, Final

import numpy as np

BUDGET_BYTES: Final = 256 * 1024 * 1024
BLOCK_VALUES: Final = 1 << 20  # of all rows together, in one block of columns


class Stack:
    """Rows of float32, all of one width. A stack is never changed: `with_row` gives a longer one,
    which shares the rows before it."""

    __slots__ = ("_rows", "_store")

    def __init__(self, width: int, *, budget: int = BUDGET_BYTES) -> None:
        self._store = _Store(width, budget)
        self._rows = 0

    def __len__(self) -> int:
        return self._rows

    @property
    def width(self) -> int:
        """Values in a row."""
        return self._store.width

    def with_row(self, vector: np.ndarray) -> Stack:
        """This stack and one row more, [width], rounded to float32."""
        longer = Stack.__new__(Stack)
        # Two stacks may grow out of one; the second takes a copy, so that neither sees the other.
        shared = self._store.rows == self._rows
        longer._store = self._store if shared else self._store.copy(self._rows)
        longer._store.append(vector)
        longer._rows = self._rows + 1
        return longer

    def row(self, number: int) -> np.ndarray:
        """One row, float32 [width]; not to be written to."""
        if not 0 <= number < self._rows:
            raise IndexError(f"row {number} of {self._rows}")
        return self._store.read(number)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self._store.read(number) for number in range(self._rows))

    def column_blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """The rows in vertical strips: (columns, float32 [rows, columns]), new arrays."""
        step = max(1, BLOCK_VALUES // max(1, self._rows))
        for start in range(0, self.width, step):
            columns = slice(start, min(start + step, self.width))
            yield columns, np.stack([self._store.read(n, columns) for n in range(self._rows)])


class _Store:
    """The one thing that grows. Rows once written are never written again."""

    def __init__(self, width: int, budget: int) -> None:
        self.width, self.rows = width, 0
        self._budget = budget
        self._memory: list[np.ndarray] = []
        self._file: IO[bytes] | None = None

    def __del__(self) -> None:
        # The last stack that shares the file is gone; closing removes it.
        if self._file is not None:
            self._file.close()

    def append(self, vector: np.ndarray) -> None:
        row = np.array(vector, np.float32).reshape(self.width)
        if (len(self._memory) + 1) * row.nbytes <= self._budget:
            row.flags.writeable = False
            self._memory.append(row)
        else:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="fedloom-updates-")  # noqa: SIM115
            self._file.seek(0, 2)
            self._file.write(row.tobytes())
        self.rows += 1

    def read(self, number: int, columns: slice = slice(None)) -> np.ndarray:
        if number < len(self._memory):
            return self._memory[number][columns]
        assert self._file is not None  # rows beyond those in memory are there
        start, stop, _ = columns.indices(self.width)
        self._file.seek(4 * ((number - len(self._memory)) * self.width + start))
        return np.frombuffer(self._file.read(4 * (stop - start)), np.float32)

    def copy(self, rows: int) -> _Store:
        other = _Store(self.width, self._budget)
        for number in range(rows):
            other.append(self.read(number))
        return other
