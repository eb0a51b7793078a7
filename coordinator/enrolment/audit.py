# SPDX-License-Identifier: Apache-2.0
"""What was decided, in a log that only grows.

Every entry's hash covers the entry and the hash before it. Whoever changes, removes or moves an
entry breaks the chain there. Whoever can write the file could hash all of it anew: an operator who
notes `head()` elsewhere now and then finds that, too, and finds entries cut off at the end.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from coordinator.enrolment.store import Store
from coordinator.errors import RegistryError

_START: Final = "0" * 64
_BATCH: Final = 1_000
_MINUTE_S: Final = 60.0
_BEFORE_ALL: Final = -(2**63)  # also before numbers that were never given


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One line of the log."""

    number: int  # from 1, without gaps
    time: float  # seconds since 1970
    event: str
    subject: str  # whom it is about: a device, a token's label, ""
    detail: Mapping[str, str | int]
    hash: str  # 64 hex digits


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """The first entry at which the log is not what was written."""

    number: int
    reason: str

    def __str__(self) -> str:
        return f"audit log: entry {self.number}: {self.reason}"


class Audit:
    """The log of one store."""

    def __init__(
        self, store: Store, *, now: Callable[[], float] = time.time, per_minute: int = 100
    ) -> None:
        """`per_minute`: most entries of `append_limited` in a minute; the others are counted."""
        self._store = store
        self._now = now
        self._per_minute = per_minute
        self._minute = now()
        self._written = 0
        self._left_out = 0

    def append(self, event: str, subject: str, **detail: str | int) -> None:
        """On disk when it returns, or with the transaction that it is a part of."""
        text = json.dumps(detail, sort_keys=True, separators=(",", ":"))
        with self._store.transaction() as db:
            number, before = self.head()
            row = (number + 1, self._now(), event, subject, text)
            db.execute("INSERT INTO audit VALUES (?, ?, ?, ?, ?, ?)", (*row, _hash(before, *row)))

    def append_limited(self, event: str, subject: str, **detail: str | int) -> None:
        """For what strangers can cause: so that they cannot fill the disk, only so many a minute.

        How many were left out is an entry of its own, when the next minute's first one comes.
        """
        with self._store.transaction():
            if not 0 <= self._now() - self._minute < _MINUTE_S:
                if self._left_out:
                    self.append("left out", "", entries=self._left_out)
                self._minute, self._written, self._left_out = self._now(), 0, 0
            if self._written < self._per_minute:
                self.append(event, subject, **detail)
                self._written += 1
            else:
                self._left_out += 1

    def head(self) -> tuple[int, str]:
        """Number and hash of the last entry; 0 and zeros of an empty log."""
        rows = self._store.rows("SELECT number, hash FROM audit ORDER BY number DESC LIMIT 1")
        return (int(rows[0][0]), str(rows[0][1])) if rows else (0, _START)

    def entries(self, *, after: int = 0) -> Iterator[Entry]:
        """The log from one entry on, the oldest first.

        Raises: RegistryError at one that cannot be read; `verify` names the first that was changed.
        """
        for number, at, event, subject, text, digest in self._rows(after):
            try:
                detail = json.loads(text)
            except ValueError as error:
                raise RegistryError(f"audit log: entry {number} cannot be read ({error})") from None
            yield Entry(
                number=number, time=at, event=event, subject=subject, detail=detail, hash=digest
            )

    def verify(self, *, head: tuple[int, str] | None = None) -> Broken | None:
        """The first entry that is not as it was written; None if all are.

        Args:
            head: what `head()` gave earlier; the log must still hold that entry.
        """
        number, before = 0, _START
        for row in self._rows(_BEFORE_ALL):
            number += 1
            if row[0] != number:
                return Broken(number=number, reason=f"expected it here, found entry {row[0]}")
            try:
                digest = _hash(before, *row[:5])
            except TypeError:  # bytes, where text was written
                digest = ""
            if digest != row[5]:
                return Broken(
                    number=number, reason="its hash is not that of its content and the one before"
                )
            if head is not None and head[0] == number and head[1] != digest:
                return Broken(number=number, reason="it was another when its hash was noted")
            before = digest
        if head is not None and head[0] > number:
            return Broken(
                number=number + 1, reason=f"it is missing, entry {head[0]} was there once"
            )
        return None

    def _rows(self, after: int) -> Iterator[tuple[Any, ...]]:
        """In batches: whoever reads a long log holds up nobody."""
        while True:
            rows = self._store.rows(
                "SELECT * FROM audit WHERE number > ? ORDER BY number LIMIT ?", (after, _BATCH)
            )
            yield from rows
            if len(rows) < _BATCH:
                return
            after = rows[-1][0]


def _hash(before: str, number: int, at: float, event: str, subject: str, text: str) -> str:
    """64 hex digits; a float's shortest spelling is the same wherever it is written."""
    content = json.dumps([before, number, at, event, subject, text], separators=(",", ":"))
    return hashlib.sha256(content.encode("ascii")).hexdigest()
