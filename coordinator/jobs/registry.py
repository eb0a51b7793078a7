# SPDX-License-Identifier: Apache-2.0
"""Which jobs a deployment has, and what its operator wants of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from coordinator.enrolment.audit import Audit
from coordinator.enrolment.store import Store
from coordinator.errors import DeploymentError
from protocol.limits import MAX_REASON_LENGTH
from protocol.rejection import displayable

_COLUMNS: Final = "name, hash, submitted, wanted, starts, ended, outcome, reason"


class Outcome(StrEnum):
    """How a job ended."""

    NONE = ""  # it has not
    FINISHED = "finished"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEntry:
    """A job that was submitted. Times are in seconds since 1970."""

    name: str
    hash: str  # of the job, 64 hex digits
    submitted: float
    wanted: bool = True  # False: the operator stopped it
    starts: int = 0  # how often it was begun or gone on with
    ended: float | None = None
    outcome: Outcome = Outcome.NONE
    reason: str = ""  # why it failed

    @property
    def due(self) -> bool:
        """Whether it should be playing."""
        return self.wanted and self.outcome is Outcome.NONE


class Jobs:
    """The jobs of one store. Any process may use it."""

    def __init__(self, store: Store, audit: Audit, *, now: Callable[[], float] = time.time) -> None:
        self._store = store
        self._audit = audit
        self._now = now

    def add(self, name: str, digest: str) -> JobEntry:
        """Enter a job. Raises: as `require_new`."""
        with self._store.transaction() as db:
            self.require_new(name, digest)
            entry = JobEntry(name=name, hash=digest, submitted=self._now())
            db.execute(
                "INSERT INTO jobs (name, hash, submitted, wanted) VALUES (?, ?, ?, 1)",
                (name, digest, entry.submitted),
            )
            self._audit.append("submitted", name, job=digest)
        return entry

    def require_new(self, name: str, digest: str) -> None:
        """Raises: DeploymentError for a name or a job that is there already."""
        if (known := self.by_hash(digest)) is not None:
            raise DeploymentError(
                f"this very job was submitted before, as {known.name}; go on with: fedloom "
                "coordinator resume, or change its seed to run it again"
            )
        if self.by_name(name) is not None:
            raise DeploymentError(
                f"a job {name} is there already, and is another one; choose another --name"
            )

    def all(self) -> list[JobEntry]:
        """Every job, in order of submission."""
        return self._entries("ORDER BY submitted, name", ())

    def by_name(self, name: str) -> JobEntry | None:
        """The job called so."""
        return next(iter(self._entries("WHERE name = ?", (name,))), None)

    def by_hash(self, digest: str) -> JobEntry | None:
        """The job with this hash."""
        return next(iter(self._entries("WHERE hash = ?", (digest,))), None)

    def named(self, name: str) -> JobEntry:
        """As `by_name`. Raises: DeploymentError where there is none."""
        if (found := self.by_name(name)) is None:
            known = ", ".join(entry.name for entry in self.all())
            raise DeploymentError(f"expected one of {known or 'no job yet'}, found {name[:80]!r}")
        return found

    def stop(self, name: str) -> bool:
        """The operator wants it no more for now; False if that was so already.

        Raises: DeploymentError for no such job, or one that has ended.
        """
        with self._store.transaction() as db:
            entry = self.named(name)
            if entry.outcome is not Outcome.NONE:
                raise DeploymentError(f"job {name} has {entry.outcome} already")
            if entry.wanted:
                db.execute("UPDATE jobs SET wanted = 0 WHERE name = ?", (name,))
                self._audit.append("stopped", name)
        return entry.wanted

    def resume(self, name: str) -> bool:
        """The operator wants it again, stopped or failed as it was; False if it is going on.

        Raises: DeploymentError for no such job, or one that is finished.
        """
        with self._store.transaction() as db:
            entry = self.named(name)
            if entry.outcome is Outcome.FINISHED:
                raise DeploymentError(
                    f"job {name} is finished; change its seed or its rounds and submit it anew"
                )
            if not entry.due:
                db.execute(
                    "UPDATE jobs SET wanted = 1, ended = NULL, outcome = '', reason = '' "
                    "WHERE name = ?",
                    (name,),
                )
                self._audit.append("resumed", name)
        return not entry.due

    def started(self, name: str) -> None:
        """Count that it was begun or gone on with."""
        with self._store.transaction() as db:
            db.execute("UPDATE jobs SET starts = starts + 1 WHERE name = ?", (name,))

    def end(self, name: str, outcome: Outcome, reason: str = "") -> None:
        """It is over; a second time changes nothing."""
        with self._store.transaction() as db:
            changed = db.execute(
                "UPDATE jobs SET ended = ?, outcome = ?, reason = ? "
                "WHERE name = ? AND outcome = ''",
                (self._now(), outcome, displayable(reason, MAX_REASON_LENGTH), name),
            ).rowcount
            if changed:
                self._audit.append(str(outcome), name)

    def _entries(self, which: str, arguments: tuple[Any, ...]) -> list[JobEntry]:
        names = _COLUMNS.split(", ")
        found = []
        for row in self._store.rows(f"SELECT {_COLUMNS} FROM jobs {which}", arguments):
            values = dict(zip(names, row, strict=True))
            values |= {"wanted": bool(values["wanted"]), "outcome": Outcome(values["outcome"])}
            found.append(JobEntry(**values))
        return found
