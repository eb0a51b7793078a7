# SPDX-License-Identifier: Apache-2.0
"""What a run has done so far, in one SQLite file, so that a crash costs at most one round.

A round is written twice: when it begins, and, in one transaction, when it is done, with its
tensors, its report, the updates that were merged and the answers that were rejected. A round that
was begun and not committed is played again from the tensors before it.

Tensors are safetensors bytes; nothing in the file is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
from safetensors.numpy import load, save

from coordinator.errors import JournalConflictError, JournalFormatError
from protocol.rejection import Rejection
from protocol.tensors import Tensors

_VERSION: Final = 2
_APPLICATION_ID: Final = 0x464C4A4E  # "FLJN": this file is one of ours
_SCHEMA: Final = """
CREATE TABLE runs (
    job TEXT PRIMARY KEY, job_toml TEXT NOT NULL, initial TEXT NOT NULL, created REAL NOT NULL
);
CREATE TABLE rounds (
    job TEXT NOT NULL REFERENCES runs, round INTEGER NOT NULL, attempts INTEGER NOT NULL,
    begun REAL NOT NULL, committed REAL, report TEXT, tensors BLOB,
    moments BLOB, PRIMARY KEY (job, round)
);
CREATE TABLE updates (
    nonce TEXT PRIMARY KEY, job TEXT NOT NULL REFERENCES runs, round INTEGER NOT NULL,
    client TEXT NOT NULL, samples INTEGER NOT NULL, bytes INTEGER NOT NULL
);
CREATE TABLE rejections (
    job TEXT NOT NULL REFERENCES runs, round INTEGER NOT NULL, client TEXT NOT NULL,
    code TEXT NOT NULL, reason TEXT NOT NULL
);
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateEntry:
    """An update that was merged; its nonce is in the journal at most once."""

    nonce: str
    client: str
    samples: int
    bytes: int


class Journal:
    """One journal file, of one writer at a time. Use it as a context manager."""

    def __init__(
        self, path: str | Path, *, keep_tensors: int = 3, now: Callable[[], float] = time.time
    ) -> None:
        """Open, or make, the journal.

        Args:
            keep_tensors: committed rounds whose tensors stay in the file, the latest ones; 0: all.
            now: the clock, in seconds since 1970.

        Raises: JournalFormatError when the file is something else.
        """
        self._path = Path(path)
        self._keep = keep_tensors
        self._now = now
        # The round loop runs in a thread of Flower's when Ray runs the clients; one thread at a
        # time uses the connection, which is what SQLite asks for.
        self._db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        try:
            self._prepare()
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise JournalFormatError(
                f"{self._path}: expected a journal, found another file ({error})"
            ) from error
        except JournalFormatError:
            self._db.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def open_run(self, job: str, job_toml: str, initial: Tensors) -> tuple[int, Tensors]:
        """Begin or continue the run of a job: the last committed round (0: none) and its tensors.

        Raises: JournalConflictError when the run had begun from other tensors.
        """
        digest = hashlib.sha256(save(dict(initial))).hexdigest()
        known = self._db.execute("SELECT initial FROM runs WHERE job = ?", (job,)).fetchone()
        if known is None:
            with self._transaction():
                row = (job, job_toml, digest, self._now())
                self._db.execute("INSERT INTO runs VALUES (?, ?, ?, ?)", row)
        elif known[0] != digest:
            raise JournalConflictError(
                f"{self._path}: expected the initial tensors that job {job[:12]} began with, found "
                "others; start it in a new folder"
            )
        last = self._db.execute(
            "SELECT round, tensors FROM rounds WHERE job = ? AND committed IS NOT NULL "
            "ORDER BY round DESC LIMIT 1",
            (job,),
        ).fetchone()
        if last is None:
            return 0, dict(initial)
        return int(last[0]), load(last[1])

    def begin_round(self, job: str, round: int) -> int:
        """Note that a round begins; gives the number of the attempt, 1 at first.

        Raises: JournalConflictError for a round that is committed already.
        """
        with self._transaction():
            self._refuse_committed(job, round)
            row = self._db.execute(
                "INSERT INTO rounds (job, round, attempts, begun) VALUES (?, ?, 1, ?) "
                "ON CONFLICT DO UPDATE SET attempts = attempts + 1, begun = excluded.begun "
                "RETURNING attempts",
                (job, round, self._now()),
            ).fetchone()
        return int(row[0])

    def commit_round(
        self,
        job: str,
        round: int,
        *,
        tensors: Tensors,
        moments: Tensors,
        report: Mapping[str, Any],
        updates: Sequence[UpdateEntry],
        rejections: Sequence[Rejection],
    ) -> None:
        """Write all that a round gave, or nothing of it.

        `moments` are what the server remembers beside the tensors; they may be empty.

        Raises: JournalConflictError for a round that is committed already, or not begun, and for
            an update that was counted before.
        """
        with self._transaction():
            self._refuse_committed(job, round)
            text = json.dumps(report, allow_nan=False)
            blobs = (save(dict(tensors)), save(dict(moments)))
            changed = self._db.execute(
                "UPDATE rounds SET committed = ?, report = ?, tensors = ?, moments = ? "
                "WHERE job = ? AND round = ?",
                (self._now(), text, *blobs, job, round),
            ).rowcount
            if not changed:
                raise JournalConflictError(f"{self._path}: round {round} was not begun")
            try:
                self._db.executemany(
                    "INSERT INTO updates VALUES (?, ?, ?, ?, ?, ?)",
                    [(u.nonce, job, round, u.client, u.samples, u.bytes) for u in updates],
                )
            except sqlite3.IntegrityError as error:
                raise JournalConflictError(
                    f"{self._path}: an update of round {round} was counted before ({error})"
                ) from error
            self._db.executemany(
                "INSERT INTO rejections VALUES (?, ?, ?, ?, ?)",
                [(job, round, r.client, r.code, r.reason) for r in rejections],
            )
            if self._keep:
                self._db.execute(
                    "UPDATE rounds SET tensors = NULL, moments = NULL WHERE job = ? AND round <= ?",
                    (job, round - self._keep),
                )

    def reports(self, job: str) -> list[dict[str, Any]]:
        """The committed rounds' reports, in order."""
        rows = self._db.execute(
            "SELECT report FROM rounds WHERE job = ? AND committed IS NOT NULL ORDER BY round",
            (job,),
        )
        return [json.loads(text) for (text,) in rows]

    def tensors(self, job: str, round: int) -> dict[str, np.ndarray] | None:
        """A committed round's tensors; None when it is not committed, or they were let go."""
        row = self._db.execute(
            "SELECT tensors FROM rounds WHERE job = ? AND round = ?", (job, round)
        ).fetchone()
        return load(row[0]) if row is not None and row[0] is not None else None

    def moments(self, job: str, round: int) -> dict[str, np.ndarray] | None:
        """What the server remembered after a round; None as in `tensors`."""
        row = self._db.execute(
            "SELECT moments FROM rounds WHERE job = ? AND round = ?", (job, round)
        ).fetchone()
        return load(row[0]) if row is not None and row[0] is not None else None

    def contributors(self, job: str, round: int) -> list[str]:
        """The clients whose updates were merged in a round; none if it is not committed."""
        query = "SELECT client FROM updates WHERE job = ? AND round = ? ORDER BY client"
        return [client for (client,) in self._db.execute(query, (job, round))]

    def merged_samples(self, job: str) -> dict[str, list[int]]:
        """Of every client whose updates were merged: their samples, in the order of rounds."""
        query = "SELECT client, samples FROM updates WHERE job = ? ORDER BY client, round"
        found: dict[str, list[int]] = {}
        for client, samples in self._db.execute(query, (job,)):
            found.setdefault(client, []).append(samples)
        return found

    def counted(self, nonce: str) -> bool:
        """Whether an update with this nonce is part of a committed round."""
        query = "SELECT 1 FROM updates WHERE nonce = ?"
        return self._db.execute(query, (nonce,)).fetchone() is not None

    def rejections(self, job: str) -> list[Rejection]:
        """What was rejected in committed rounds, in order."""
        rows = self._db.execute(
            "SELECT client, round, code, reason FROM rejections WHERE job = ? ORDER BY rowid",
            (job,),
        )
        return [Rejection(client=c, round=n, code=code, reason=text) for c, n, code, text in rows]

    def _prepare(self) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")  # a committed round survives a power cut
        self._db.execute("PRAGMA foreign_keys = ON")
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        (application,) = self._db.execute("PRAGMA application_id").fetchone()
        (tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if tables == 0:
            script = f"PRAGMA application_id = {_APPLICATION_ID}; PRAGMA user_version = {_VERSION};"
            self._db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} {script} COMMIT;")
        elif (application, version) != (_APPLICATION_ID, _VERSION):
            raise JournalFormatError(
                f"{self._path}: expected a journal of version {_VERSION}, found "
                + (f"version {version}" if application == _APPLICATION_ID else "another database")
            )

    def _refuse_committed(self, job: str, round: int) -> None:
        row = self._db.execute(
            "SELECT committed FROM rounds WHERE job = ? AND round = ?", (job, round)
        ).fetchone()
        if row is not None and row[0] is not None:
            raise JournalConflictError(f"{self._path}: round {round} is committed already")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")
