# SPDX-License-Identifier: Apache-2.0
"""The plans of a split job that devices may be at work on, and the bytes of their sessions.

The player writes down each plan as it goes out; the split server, another process, opens a session
for no other. Neither outlives a crash of the machine, and need not: a plan is sent again then.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Final, Self

from coordinator.link import Failure, Link, Outgoing, never
from protocol.plan import unpack_plan
from protocol.readiness import Readiness
from protocol.stream import Open

_WAIT_S: Final = 10.0
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS plans (client TEXT PRIMARY KEY, round INTEGER NOT NULL, nonce TEXT NOT
    NULL);
CREATE TABLE IF NOT EXISTS bytes (up INTEGER NOT NULL, down INTEGER NOT NULL);
INSERT INTO bytes SELECT 0, 0 WHERE NOT EXISTS (SELECT * FROM bytes);
"""


class Outstanding:
    """One file that two processes share. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(
            path, isolation_level=None, check_same_thread=False, timeout=_WAIT_S
        )
        self._db.execute("PRAGMA synchronous = OFF")
        self._db.executescript(_SCHEMA)
        self._told = self._bytes()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def expect(self, client: str, round: int, nonce: str) -> None:
        """A plan goes out; the one that the client had before is over."""
        self._db.execute("INSERT OR REPLACE INTO plans VALUES (?, ?, ?)", (client, round, nonce))

    def reason_against(self, opened: Open) -> str:
        """Why no session is opened; "" for one of a plan that is out."""
        row = (opened.client, opened.round, opened.nonce)
        found = self._db.execute(
            "SELECT 1 FROM plans WHERE client = ? AND round = ? AND nonce = ?", row
        ).fetchone()
        return "" if found else "no plan is out for this client, round and attempt"

    def count(self, up: int, down: int) -> None:
        """Bytes of sessions, beside those before."""
        self._db.execute("UPDATE bytes SET up = up + ?, down = down + ?", (up, down))

    def streamed(self) -> tuple[int, int]:
        """Bytes up and down since this was last asked, or opened."""
        before, self._told = self._told, self._bytes()
        return self._told[0] - before[0], self._told[1] - before[1]

    def _bytes(self) -> tuple[int, int]:
        up, down = self._db.execute("SELECT up, down FROM bytes").fetchone()
        return int(up), int(down)


class ExpectingLink:
    """A `Link` that writes each plan down before it goes out."""

    def __init__(self, link: Link, outstanding: Outstanding) -> None:
        self._link = link
        self._outstanding = outstanding

    def survey(self, job: str) -> Mapping[str, Readiness]:
        """See `Link.survey`."""
        return self._link.survey(job)

    def refused(self, client: str) -> Failure | None:
        """See `Link.refused`."""
        return self._link.refused(client)

    def exchange(
        self, outgoing: Iterable[Outgoing | None], *, closed: Callable[[], bool] = never
    ) -> Generator[tuple[str, bytes | Failure]]:
        """See `Link.exchange`."""
        with closing(self._link.exchange(self._written(outgoing), closed=closed)) as arriving:
            yield from arriving

    def _written(self, outgoing: Iterable[Outgoing | None]) -> Iterator[Outgoing | None]:
        for message in outgoing:
            if message is not None and message.kind != "sum":
                plan, _ = unpack_plan(message.blob, max_bytes=len(message.blob))
                self._outstanding.expect(message.client, plan.round, plan.nonce)
            yield message
