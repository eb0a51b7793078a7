# SPDX-License-Identifier: Apache-2.0
"""Updates that wait on disk until the coordinator is done with them.

An entry is a file, `000000000012-JOB-ROUND-NONCE.update`, written whole or not at all. A plan that
is asked again, after a crash of either side, is answered with the bytes of the first time: it is
not trained again, and the coordinator counts its nonce once.

    offset  bytes
    0       4      magic `FLOB`
    4       2      version, little-endian
    6       32     SHA-256 of the plan that was answered
    38      32     SHA-256 of the entry's key, the field before and all that follows
    70      …      the update container
"""

from __future__ import annotations

import hashlib
import logging
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from client_sdk.durable import is_locked, locked, make_folder
from client_sdk.errors import OutboxError, PlanError
from protocol.errors import ContainerError
from protocol.owned_files import PARTIAL, sync_folder, write_whole
from protocol.plan import Plan, unpack_plan

DEFAULT_BYTES: Final = 256 << 20
SET_ASIDE: Final = "set-aside"
"""The folder of entries that were found broken, each with a text file that says how."""

_MAGIC: Final = b"FLOB"
_VERSION: Final = 1
_PREFIX: Final = struct.Struct("<4sH32s32s")
_NAME: Final = re.compile(r"(\d{12,})-([0-9a-f]{64})-(\d{1,10})-([0-9a-f]{16,64})\.update")
_FINISHED: Final = ".finished"
_LOCK: Final = "lock"
_ANSWERING: Final = "answering"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """What an update answers: one attempt of one round of one job."""

    job: str  # SHA-256 of the job, 64 hex digits
    round: int
    nonce: str  # hex

    @classmethod
    def of(cls, plan: Plan) -> Attempt:
        """The attempt that a plan is of."""
        return cls(job=plan.job, round=plan.round, nonce=plan.nonce)

    def __str__(self) -> str:
        return f"job {self.job[:12]}, round {self.round}, attempt {self.nonce[:12]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An update in the outbox; of two entries the one of the smaller number is older."""

    number: int
    attempt: Attempt
    path: Path
    size: int  # bytes of the file
    finished: bool  # its job has ended


class Outbox:
    """The updates of one device, in a folder of its own that several processes may open.

    Its entries and those set aside have at most `max_bytes` together. To make room the broken ones
    go first, then the oldest of jobs that have ended, then the oldest; each is logged.
    """

    def __init__(self, folder: Path, *, max_bytes: int = DEFAULT_BYTES) -> None:
        """Opens the folder, or makes it. Raises: OutboxError."""
        if max_bytes < 1:
            raise OutboxError(f"max_bytes: expected at least 1, found {max_bytes}")
        self._folder = folder
        self._max_bytes = max_bytes
        try:
            make_folder(folder)
        except OSError as error:
            raise _unusable(folder, error) from error
        with self._locked():
            for left in folder.rglob(f"*{PARTIAL}"):
                left.unlink(missing_ok=True)
            for path in folder.glob("*.update"):
                if not _NAME.fullmatch(path.name):
                    self._set_aside(path, "its name is none that an entry has")

    def entries(self) -> list[Entry]:
        """All that is kept, oldest first. Raises: OutboxError."""
        with self._locked():
            return self._entries()

    def get(self, attempt: Attempt, plan_blob: bytes) -> bytes | None:
        """The update that this plan was answered with; None if there is none any more.

        An entry that is broken is set aside, with the reason, and counts as none.

        Raises: OutboxError when the attempt was answered for another plan.
        """
        with self._locked():
            return self._get(attempt, _digest(plan_blob))

    def put(self, attempt: Attempt, plan_blob: bytes, update: bytes) -> None:
        """Keep an update; durable when it returns. The same one twice is kept once.

        Raises: OutboxError when it has no room, or another one is kept for the attempt.
        """
        plan_digest = _digest(plan_blob)
        checksum = _checksum(attempt, plan_digest, update)
        head = _PREFIX.pack(_MAGIC, _VERSION, plan_digest, checksum)
        size = len(head) + len(update)
        if size > self._max_bytes:
            raise OutboxError(
                f"{self._folder}: expected updates of at most {self._max_bytes} bytes, {attempt} "
                f"has {size}; allow the outbox more"
            )
        with self._locked():
            kept = self._get(attempt, plan_digest)
            if kept is not None:
                if kept != update:
                    raise OutboxError(f"{attempt}: another update is kept for it already")
                return
            entries = self._entries()
            self._make_room(size, entries)
            number = 1 + max((entry.number for entry in entries), default=0)
            name = f"{number:012d}-{attempt.job}-{attempt.round}-{attempt.nonce}.update"
            if not _NAME.fullmatch(name):
                raise OutboxError(f"{attempt}: expected a job and a nonce in hex digits")
            write_whole(self._folder / name, head, update)
            self._mark(attempt.job).unlink(missing_ok=True)  # the job goes on
            self._forget_jobs()

    def acknowledge(self, attempt: Attempt) -> None:
        """The coordinator has it: let it go. Nothing happens where it is not kept."""
        self._drop(lambda entry: entry.attempt == attempt)

    def settle(self, job: str, *, before: int) -> None:
        """The coordinator is done with a job's rounds below `before`: let their updates go."""
        self._drop(lambda entry: entry.attempt.job == job and entry.attempt.round < before)

    def finish(self, job: str) -> None:
        """The job has ended: what is left of it is the first to go when room is needed."""
        with self._locked():
            if any(entry.attempt.job == job for entry in self._entries()):
                write_whole(self._mark(job))

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Held by the one process that works on a plan: two that have the same one would train
        twice, and write what the client keeps at the same time."""
        with ExitStack() as held:
            try:
                held.enter_context(locked(self._folder / _ANSWERING))
            except OSError as error:
                raise _unusable(self._folder, error) from error
            yield

    def is_answering(self) -> bool:
        """Whether a process works on a plan now. Raises: OutboxError."""
        try:
            return is_locked(self._folder / _ANSWERING)
        except OSError as error:
            raise _unusable(self._folder, error) from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            with locked(self._folder / _LOCK):
                yield
        except OSError as error:
            raise _unusable(self._folder, error) from error

    def _mark(self, job: str) -> Path:
        return self._folder / f"{job}{_FINISHED}"

    def _entries(self) -> list[Entry]:
        found = []
        for path in self._folder.glob("*.update"):
            if match := _NAME.fullmatch(path.name):
                number, job, round, nonce = match.groups()
                attempt = Attempt(job=job, round=int(round), nonce=nonce)
                found.append(
                    Entry(
                        number=int(number),
                        attempt=attempt,
                        path=path,
                        size=path.stat().st_size,
                        finished=self._mark(job).exists(),
                    )
                )
        return sorted(found, key=lambda entry: entry.number)

    def _get(self, attempt: Attempt, plan_digest: bytes) -> bytes | None:
        for entry in self._entries():
            if entry.attempt != attempt:
                continue
            blob = entry.path.read_bytes()
            if problem := _problem(blob, attempt):
                self._set_aside(entry.path, problem)
                continue
            if _PREFIX.unpack_from(blob)[2] != plan_digest:
                raise OutboxError(
                    f"{attempt}: it was asked with another plan before; an attempt's nonce is for "
                    "one plan"
                )
            return blob[_PREFIX.size :]
        return None

    def _set_aside(self, path: Path, problem: str) -> None:
        _log.error("outbox %s: %s is set aside: %s", self._folder, path.name, problem)
        folder = self._folder / SET_ASIDE
        make_folder(folder)
        write_whole(folder / f"{path.name}.reason", f"{problem}\n".encode())
        path.replace(folder / path.name)
        sync_folder(folder)
        sync_folder(self._folder)

    def _make_room(self, size: int, entries: list[Entry]) -> None:
        broken = self._folder / SET_ASIDE
        aside = sorted(broken.iterdir()) if broken.is_dir() else []
        sizes = {path: path.stat().st_size for path in aside}
        ended_first = sorted(entries, key=lambda entry: not entry.finished)
        sizes |= {entry.path: entry.size for entry in ended_first}
        used = sum(sizes.values())
        for path, gained in sizes.items():
            if used + size <= self._max_bytes:
                return
            _log.warning(
                "outbox %s: %s (%d bytes) makes room for a newer update; it was not acknowledged",
                self._folder, path.name, gained,
            )  # fmt: skip
            path.unlink()
            used -= gained

    def _drop(self, chosen: Callable[[Entry], bool]) -> None:
        with self._locked():
            entries = self._entries()
            gone = [entry for entry in entries if chosen(entry)]
            for entry in gone:
                entry.path.unlink()
            if gone:
                self._forget_jobs()
                sync_folder(self._folder)

    def _forget_jobs(self) -> None:
        """Remove the marks of jobs that nothing is left of."""
        jobs = {entry.attempt.job for entry in self._entries()}
        for mark in self._folder.glob(f"*{_FINISHED}"):
            if mark.name.removesuffix(_FINISHED) not in jobs:
                mark.unlink(missing_ok=True)


def answer_once(plan_blob: bytes, outbox: Outbox, answer: Callable[[bytes], bytes]) -> bytes:
    """The answer to a plan: from the outbox if it was given before, else from `answer`.

    Put it around whatever answers plans, `respond` or `respond_split`, so that a plan that is asked
    again opens no session either. A plan of a later round says that the coordinator is done with
    the earlier ones of its job, since it asks a device for one round at a time. Evaluations leave
    nothing behind and are not kept.

    Raises: PlanError for a plan that cannot be read; OutboxError for a nonce that comes again with
    another plan; whatever `answer` raises.
    """
    try:
        plan, _ = unpack_plan(plan_blob, max_bytes=len(plan_blob))
    except ContainerError as error:
        raise PlanError(f"plan: {error}") from None
    attempt = Attempt.of(plan)
    with outbox.answering():
        if plan.task == "fit" and (kept := outbox.get(attempt, plan_blob)) is not None:
            _log.info("%s: answered from the outbox", attempt)
            return kept
        update = answer(plan_blob)
        try:
            outbox.settle(plan.job, before=plan.round)
            if plan.task == "fit":
                outbox.put(attempt, plan_blob, update)
        except OutboxError as error:
            # Sent all the same: asked again, the plan would give the same bits.
            _log.error("%s is sent and not kept: %s", attempt, error)
    return update


def _problem(blob: bytes, attempt: Attempt) -> str:
    """What is wrong with an entry's bytes; "" for nothing."""
    if len(blob) < _PREFIX.size:
        return f"expected {_PREFIX.size} bytes or more, found {len(blob)}"
    magic, version, plan_digest, checksum = _PREFIX.unpack_from(blob)
    if (magic, version) != (_MAGIC, _VERSION):
        return f"expected it to start {_MAGIC!r}, version {_VERSION}; found {magic!r}, {version}"
    found = _checksum(attempt, plan_digest, blob[_PREFIX.size :])
    if found != checksum:
        return f"expected SHA-256 {checksum.hex()}, found {found.hex()}: its bytes have changed"
    return ""


def _digest(blob: bytes) -> bytes:
    return hashlib.sha256(blob).digest()


def _checksum(attempt: Attempt, plan_digest: bytes, update: bytes) -> bytes:
    key = f"{attempt.job}-{attempt.round}-{attempt.nonce}".encode()
    # The key's length is that of its parts, the digest's is fixed: no two entries hash the same.
    digest = hashlib.sha256(key + b"\0" + plan_digest)
    digest.update(update)
    return digest.digest()


def _unusable(folder: Path, error: OSError) -> OutboxError:
    return OutboxError(
        f"outbox {folder}: {error.strerror or error}; make room, or set the folder's owner right"
    )
