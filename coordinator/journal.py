# SPDX-License-Identifier: Apache-2.0
"""What a run has done so far, in one SQLite file, so that a crash costs at most one round.

A round is written twice: when it begins, with the clients that are asked and the nonce of each,
and, in one transaction, when it is done, with its tensors, its report, the updates that were merged
and the answers that were rejected. A round that was begun and not committed is played again from
the tensors before it, with the same clients and the same nonces.

A private round is charged for as it begins, in the same transaction, and its secret seed is kept
until it is committed: whatever happens in between, no release is without its charge, none is
charged twice, and the same updates get the same noise. Until then the file is as secret as that.

A secure sum is written down as soon as it is opened, before anything is done with it: clients open
one sum of a round and no other, so that it could not be had again. A round that has one is gone on
with from there, and nobody is asked. It is erased when the round is committed, as a seed is: of a
private round it is the sum before its noise.

Deployments keep answers as well, each from when it comes to when its round is committed: training
that a device has done once is not asked for again. Simulations do not, since a write to the disk an
update would take longer than to train it.

Tensors are safetensors bytes; nothing in the file is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
from safetensors.numpy import load, save

from aggregation.packing import pack, unpack
from aggregation.privacy.accountant import (
    Mechanism,
    mechanism_from_json,
    mechanism_to_json,
)
from coordinator.errors import JournalConflictError, JournalFormatError
from protocol.rejection import Rejection
from protocol.tensors import Tensors
from protocol.update import UpdateHeader

_VERSION: Final = 5
_APPLICATION_ID: Final = 0x464C4A4E  # "FLJN": this file is one of ours
_WAIT_S: Final = 10.0  # for another process that holds the file
_WAIT_STEP_S: Final = 0.01
_SCHEMA: Final = """
CREATE TABLE runs (
    job TEXT PRIMARY KEY, job_toml TEXT NOT NULL, initial TEXT NOT NULL, created REAL NOT NULL
);
CREATE TABLE rounds (
    job TEXT NOT NULL REFERENCES runs, round INTEGER NOT NULL, attempts INTEGER NOT NULL,
    begun REAL NOT NULL, known INTEGER NOT NULL, asked TEXT, committed REAL, report TEXT,
    tensors BLOB, moments BLOB, PRIMARY KEY (job, round)
);
CREATE TABLE answers (
    place INTEGER PRIMARY KEY, nonce TEXT NOT NULL UNIQUE, job TEXT NOT NULL REFERENCES runs,
    round INTEGER NOT NULL, client TEXT NOT NULL, answer BLOB NOT NULL
);
CREATE TABLE updates (
    nonce TEXT PRIMARY KEY, job TEXT NOT NULL REFERENCES runs, round INTEGER NOT NULL,
    client TEXT NOT NULL, samples INTEGER NOT NULL, bytes INTEGER NOT NULL
);
CREATE TABLE rejections (
    job TEXT NOT NULL REFERENCES runs, round INTEGER NOT NULL, client TEXT NOT NULL,
    code TEXT NOT NULL, reason TEXT NOT NULL
);
CREATE TABLE charges (
    job TEXT NOT NULL REFERENCES runs, round INTEGER NOT NULL, mechanism TEXT NOT NULL,
    clip REAL NOT NULL, seed BLOB, PRIMARY KEY (job, round)
);
CREATE TABLE sums (
    job TEXT NOT NULL REFERENCES runs, round INTEGER NOT NULL, bits INTEGER NOT NULL,
    length INTEGER NOT NULL, packed BLOB NOT NULL, about TEXT NOT NULL, PRIMARY KEY (job, round)
);
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateEntry:
    """An update that was merged; its nonce is in the journal at most once."""

    nonce: str
    client: str
    samples: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """How a round began, for the first time."""

    nonces: Mapping[str, str]
    """Of the clients that are asked, by their names, in the order in which they are merged."""
    known: int
    """Clients that there were in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Whose answer is in the journal, and to which plan."""

    client: str
    round: int
    nonce: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """What a private round releases, and costs."""

    round: int
    mechanism: Mechanism
    clip: float
    seed: bytes = field(repr=False)
    """Of the draw and of the noise; empty once the round is committed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedSum:
    """A round's secure sum, and all that the rest of the round needs beside it."""

    values: np.ndarray = field(repr=False)
    """[length], of the type that `aggregation.packing.word_type` gives for `bits`."""
    bits: int
    members: Mapping[str, tuple[UpdateHeader, int]]
    """Whose updates it is of, in order: what each answered, and the bytes that it sent in all."""
    rejections: Sequence[Rejection]
    uplink_bytes: int
    downlink_bytes: int
    """Of the whole round, as its rejections are."""


class Journal:
    """One journal file, of one writer at a time. Use it as a context manager."""

    def __init__(
        self,
        path: str | Path,
        *,
        keep_tensors: int = 3,
        keep_answers: bool = False,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Open, or make, the journal.

        Args:
            keep_tensors: committed rounds whose tensors stay in the file, the latest ones; 0: all.
            keep_answers: answers are written down as they come, and each is on the disk before
                anything is done with it.
            now: the clock, in seconds since 1970.

        Raises: JournalFormatError when the file is something else; sqlite3.OperationalError when it
            cannot be opened now, as on a full disk.
        """
        self._path = Path(path)
        self._keep = keep_tensors
        self.keeps_answers = keep_answers
        self._now = now
        # The round loop runs in a thread of Flower's when Ray runs the clients; one thread at a
        # time uses the connection, which is what SQLite asks for.
        self._db = sqlite3.connect(
            self._path, isolation_level=None, check_same_thread=False, timeout=_WAIT_S
        )
        try:
            self._prepare()
        except sqlite3.OperationalError:
            # Nothing is wrong with the file: it goes on when there is room.
            self._db.close()
            raise
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

    def begin_round(
        self,
        job: str,
        round: int,
        nonces: Mapping[str, str],
        known: int,
        *,
        charge: Charge | None = None,
    ) -> Start:
        """Note that a round begins, before anybody is asked; see `Start`.

        A private round is charged for at once.

        Raises: JournalConflictError for a round that has begun, or is committed already.
        """
        start = Start(nonces=dict(nonces), known=known)
        with self._transaction():
            self._refuse_committed(job, round)
            try:
                self._db.execute(
                    "INSERT INTO rounds (job, round, attempts, begun, known, asked) "
                    "VALUES (?, ?, 1, ?, ?, ?)",
                    (job, round, self._now(), known, json.dumps(start.nonces)),
                )
            except sqlite3.IntegrityError as error:
                raise JournalConflictError(
                    f"{self._path}: expected a round to begin, round {round} has; go on with it "
                    f"({error})"
                ) from error
            if charge is not None:
                self._db.execute(
                    "INSERT INTO charges VALUES (?, ?, ?, ?, ?)",
                    (job, round, _mechanism_text(charge), charge.clip, charge.seed),
                )
        return start

    def charges(self, job: str) -> list[Charge]:
        """What private rounds were charged for, those included that are not committed, in order."""
        rows = self._db.execute(
            "SELECT round, mechanism, clip, seed FROM charges WHERE job = ? ORDER BY round", (job,)
        )
        return [
            Charge(
                round=round,
                mechanism=mechanism_from_json(json.loads(mechanism)),
                clip=clip,
                seed=bytes(seed or b""),
            )
            for round, mechanism, clip, seed in rows
        ]

    def resume_round(self, job: str, round: int) -> Start | None:
        """How a round began that was not committed; None for one that has not begun.

        Every call is one more attempt. Raises: JournalConflictError for a round that is committed.
        """
        with self._transaction():
            self._refuse_committed(job, round)
            row = self._db.execute(
                "UPDATE rounds SET attempts = attempts + 1 WHERE job = ? AND round = ? "
                "RETURNING asked, known",
                (job, round),
            ).fetchone()
        return None if row is None else Start(nonces=json.loads(row[0]), known=row[1])

    def keep_answer(self, job: str, round: int, client: str, nonce: str, answer: bytes) -> None:
        """Write an answer down; it is on the disk when this returns.

        Raises: JournalConflictError when one is kept for the nonce, or an update of that nonce was
            counted.
        """
        with self._transaction():
            if self.counted(nonce):
                raise JournalConflictError(f"{self._path}: nonce {nonce} was counted before")
            try:
                self._db.execute(
                    "INSERT INTO answers (nonce, job, round, client, answer) "
                    "VALUES (?, ?, ?, ?, ?)",
                    (nonce, job, round, client, answer),
                )
            except sqlite3.IntegrityError as error:
                raise JournalConflictError(
                    f"{self._path}: an answer to nonce {nonce} is kept already ({error})"
                ) from error

    def keeps(self, nonce: str) -> bool:
        """Whether there is an answer with that nonce."""
        query = "SELECT 1 FROM answers WHERE nonce = ?"
        return self._db.execute(query, (nonce,)).fetchone() is not None

    def kept_answer(self, nonce: str) -> tuple[str, bytes]:
        """Whose it is, and the bytes. Raises: JournalConflictError where none is kept."""
        row = self._db.execute(
            "SELECT client, answer FROM answers WHERE nonce = ?", (nonce,)
        ).fetchone()
        if row is None:
            raise JournalConflictError(f"{self._path}: no answer to nonce {nonce} is kept")
        return str(row[0]), bytes(row[1])

    def kept_answers(self, job: str) -> list[Kept]:
        """Whose answers are kept, in the order in which they came."""
        query = "SELECT client, round, nonce FROM answers WHERE job = ? ORDER BY place"
        rows = self._db.execute(query, (job,))
        return [Kept(client=client, round=round, nonce=nonce) for client, round, nonce in rows]

    def keep_sum(self, job: str, round: int, opened: OpenedSum) -> None:
        """Write a round's sum down; it is on the disk when this returns.

        Raises: JournalConflictError for a round that is committed already, or has a sum.
        """
        packed = pack(opened.values, opened.bits)
        row = (job, round, opened.bits, opened.values.size, packed, _about_text(opened))
        with self._transaction():
            self._refuse_committed(job, round)
            try:
                self._db.execute("INSERT INTO sums VALUES (?, ?, ?, ?, ?, ?)", row)
            except sqlite3.IntegrityError as error:
                raise JournalConflictError(
                    f"{self._path}: a sum of round {round} is kept already ({error})"
                ) from error

    def keeps_sum(self, job: str, round: int) -> bool:
        """Whether a round that is not committed has its sum."""
        query = "SELECT 1 FROM sums WHERE job = ? AND round = ?"
        return self._db.execute(query, (job, round)).fetchone() is not None

    def opened_sum(self, job: str, round: int) -> OpenedSum | None:
        """The sum of a round that is not committed; None where none was opened."""
        row = self._db.execute(
            "SELECT bits, length, packed, about FROM sums WHERE job = ? AND round = ?",
            (job, round),
        ).fetchone()
        if row is None:
            return None
        bits, length, packed, about = row
        told = json.loads(about)
        return OpenedSum(
            values=unpack(packed, length, bits),
            bits=bits,
            members={
                fields["client"]: (UpdateHeader(**fields), size) for fields, size in told["members"]
            },
            rejections=[Rejection(**fields) for fields in told["rejections"]],
            uplink_bytes=told["uplink_bytes"],
            downlink_bytes=told["downlink_bytes"],
        )

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
        settled: Iterable[str] = (),
    ) -> None:
        """Write all that a round gave, or nothing of it.

        `moments` are what the server remembers beside the tensors; they may be empty. Answers to
        the nonces `settled`, merged or not, are let go. The round's seed and its sum are erased.

        Raises: JournalConflictError for a round that is committed already, or not begun, and for
            an update that was counted before.
        """
        with self._transaction():
            self._refuse_committed(job, round)
            text = json.dumps(report, allow_nan=False)
            blobs = (save(dict(tensors)), save(dict(moments)))
            changed = self._db.execute(
                "UPDATE rounds SET committed = ?, report = ?, tensors = ?, moments = ?, "
                "asked = NULL WHERE job = ? AND round = ?",
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
            self._db.executemany(
                "DELETE FROM answers WHERE nonce = ?", [(nonce,) for nonce in settled]
            )
            erased = self._erase(job, round)
            if self._keep:
                self._db.execute(
                    "UPDATE rounds SET tensors = NULL, moments = NULL WHERE job = ? AND round <= ?",
                    (job, round - self._keep),
                )
        if erased:
            # What was erased still stands in the log of changes until that begins anew. Whoever
            # reads the file at this moment puts that off to the next round, or to the end.
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _erase(self, job: str, round: int) -> bool:
        """Who reads the file later learns nothing of a round's noise; whether there was any, or a
        sum."""
        seeds = self._db.execute(
            "UPDATE charges SET seed = NULL WHERE job = ? AND round = ?", (job, round)
        ).rowcount
        # Pages that a long value leaves are overwritten as well: of all else that would be a second
        # write for nothing.
        self._db.execute("PRAGMA secure_delete = ON")
        try:
            sums = self._db.execute(
                "DELETE FROM sums WHERE job = ? AND round = ?", (job, round)
            ).rowcount
        finally:
            self._db.execute("PRAGMA secure_delete = FAST")
        return bool(seeds or sums)

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
        self._use_wal()
        self._db.execute("PRAGMA synchronous = FULL")  # a committed round survives a power cut
        self._db.execute("PRAGMA foreign_keys = ON")
        self._db.execute("PRAGMA secure_delete = FAST")  # what a page loses is overwritten
        if self._marks()[0] == 0:
            with self._transaction():
                # Again, inside: who follows a job may open its journal while it is made.
                if self._marks()[0] == 0:
                    for statement in _SCHEMA.split(";"):
                        self._db.execute(statement)
                    self._db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                    self._db.execute(f"PRAGMA user_version = {_VERSION}")
        _, application, version = self._marks()
        if (application, version) != (_APPLICATION_ID, _VERSION):
            raise JournalFormatError(
                f"{self._path}: expected a journal of version {_VERSION}, found "
                + (f"version {version}" if application == _APPLICATION_ID else "another database")
            )

    def _use_wal(self) -> None:
        """SQLite does not wait here for another process that does the same to a new file."""
        last = time.monotonic() + _WAIT_S
        while True:
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > last:
                    raise
                time.sleep(_WAIT_STEP_S)

    def _marks(self) -> tuple[int, int, int]:
        """How many tables there are, whose file it is, and of which version."""
        (tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        (application,) = self._db.execute("PRAGMA application_id").fetchone()
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        return tables, application, version

    def _refuse_committed(self, job: str, round: int) -> None:
        row = self._db.execute(
            "SELECT committed FROM rounds WHERE job = ? AND round = ?", (job, round)
        ).fetchone()
        if row is not None and row[0] is not None:
            raise JournalConflictError(f"{self._path}: round {round} is committed already")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield
            self._db.execute("COMMIT")
        except BaseException:
            # A full disk ends it by itself, or leaves it open where COMMIT was what failed.
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise


def _mechanism_text(charge: Charge) -> str:
    return json.dumps(mechanism_to_json(charge.mechanism), allow_nan=False)


def _about_text(opened: OpenedSum) -> str:
    content = {
        "members": [(asdict(header), size) for header, size in opened.members.values()],
        "rejections": [asdict(rejection) for rejection in opened.rejections],
        "uplink_bytes": opened.uplink_bytes,
        "downlink_bytes": opened.downlink_bytes,
    }
    return json.dumps(content, allow_nan=False)
