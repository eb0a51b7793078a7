# SPDX-License-Identifier: Apache-2.0
"""One exchange: plans go out, and what comes back is admitted, in the order of the clients' names.

Where the journal keeps answers, each is written there before anything else is done with it, and all
are read again one by one when the exchange is over: memory stays flat, and what a crash interrupts
need not be asked again. Where it does not, an answer that comes early waits, encoded, for those
before it: at most the updates of one round, and none where a link answers in order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Final

from coordinator.admission import Admitted, admit
from coordinator.journal import Journal, UpdateEntry
from coordinator.link import Failure, Outgoing
from coordinator.plans import Plans
from protocol.rejection import Rejection, RejectionCode

STRAY: Final = Failure(
    code=RejectionCode.DUPLICATE, reason="answered again, or without having been asked"
)
_SILENT = Failure(code=RejectionCode.NO_REPLY, reason="no answer came")

Answer = tuple[str, bytes | Failure]


@dataclass(slots=True, kw_only=True)
class Answers:
    """What one exchange has given so far; filled in while it lasts."""

    updates: list[UpdateEntry] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    losses: list[tuple[float, int]] = field(default_factory=list)
    accuracy: dict[str, float] = field(default_factory=dict)
    local_accuracy: dict[str, float] = field(default_factory=dict)
    mixed_accuracy: dict[str, float] = field(default_factory=dict)
    selected: dict[str, list[float]] = field(default_factory=dict)
    uplink_bytes: int = 0
    downlink_bytes: int = 0

    def refuse(self, client: str, number: int, failure: Failure) -> None:
        """Note that nothing of this client's is used in a round."""
        self.rejections.append(
            Rejection(client=client, round=number, code=failure.code, reason=failure.reason)
        )

    def mean_loss(self) -> float | None:
        """The clients' training losses, weighted by samples; None when nobody told one."""
        if not self.losses:
            return None
        weight = sum(samples for _, samples in self.losses)
        mean = math.fsum(loss * samples / weight for loss, samples in self.losses)
        # Metrics are finite each, yet a hostile one may be near the largest float.
        return finite(mean)


@dataclass(slots=True, kw_only=True)
class Exchange:
    """Plans to the clients of `nonces`, in that order, and their answers."""

    plans: Plans
    nonces: Mapping[str, str]
    answers: Answers
    closes_at: float = math.inf
    """By the run's clock."""
    quorum: int = 0
    """Valid answers after which no more are waited for; 0: all are."""
    _valid: int = field(default=0, init=False)
    _late: bool = field(default=False, init=False)
    _heard: set[str] = field(default_factory=set, init=False)

    def admitted(self) -> Iterator[tuple[Admitted, int]]:
        """What may be merged, in the order of `nonces`, with its size in bytes.

        Bytes are those handed to the link and got from it, containers with their headers.
        """
        run, number, answers = self.plans.run, self.plans.number, self.answers
        if self._fits:
            run.watch.asked(number, list(self.nonces))
        keeps = self._fits and run.journal.keeps_answers
        for client, answer in self._kept(run.journal) if keeps else self._streamed():
            if isinstance(answer, bytes):
                answers.uplink_bytes += len(answer)
                answer = run.link.refused(client) or answer
            if isinstance(answer, Failure):
                answers.refuse(client, number, answer)
                continue
            verdict = self._admit(client, answer)
            if isinstance(verdict, Rejection):
                answers.rejections.append(verdict)
            else:
                yield verdict, len(answer)

    def _streamed(self) -> Iterator[Answer]:
        arriving = self._told(self._arriving(list(self.nonces)))
        if self.quorum:
            arriving = until_quorum(arriving, self.quorum, self._counts)
        yield from in_order(list(self.nonces), arriving, self._stray, self._absence)

    def _told(self, arriving: Generator[Answer]) -> Generator[Answer]:
        """The same, of which the watch is told."""
        with closing(arriving):
            for client, answer in arriving:
                first = client in self.nonces and client not in self._heard
                if first and isinstance(answer, bytes):
                    self._heard_of(client)
                yield client, answer

    def _kept(self, journal: Journal) -> Iterator[Answer]:
        """What the journal holds once the exchange is over, or what is said in its place."""
        instead: dict[str, Failure] = {}
        silent = []
        for client, nonce in self.nonces.items():
            if not journal.keeps(nonce):
                silent.append(client)
                continue
            self._heard.add(client)
            if self.quorum:
                self._counts(*journal.kept_answer(nonce))
        if silent and not self._has_quorum:
            self._collect(journal, silent, instead)
        for client, nonce in self.nonces.items():
            if journal.keeps(nonce):
                yield journal.kept_answer(nonce)
            else:
                yield client, instead.get(client) or self._absence()

    def _collect(self, journal: Journal, clients: list[str], instead: dict[str, Failure]) -> None:
        """Ask these clients, and write down what they answer; failures go into `instead`."""
        job, number = self.plans.run.hash, self.plans.number
        open_ = set(clients)
        with closing(self._arriving(clients)) as arriving:
            for client, answer in arriving:
                if client not in open_:
                    self._stray(client, STRAY)
                    continue
                open_.remove(client)
                nonce = self.nonces[client]
                most = self.plans.expected(client, nonce).max_bytes
                if isinstance(answer, Failure):
                    instead[client] = answer
                elif len(answer) > most:
                    # It would be rejected in any case, and the disk is not for the asking.
                    self.answers.uplink_bytes += len(answer)
                    reason = f"update: expected at most {most} bytes, found {len(answer)}"
                    instead[client] = Failure(code=RejectionCode.TOO_LONG, reason=reason)
                else:
                    journal.keep_answer(job, number, client, nonce, answer)
                    self._heard_of(client)
                    if self.quorum and self._counts(client, answer) and self._has_quorum:
                        return

    def _arriving(self, clients: Sequence[str]) -> Generator[Answer]:
        """Answers as they come, until all are there or the time is up."""
        run = self.plans.run

        def outgoing() -> Iterator[Outgoing]:
            for client in clients:
                blob = self.plans.plan(client, self.nonces[client])
                self.answers.downlink_bytes += len(blob)
                yield Outgoing(client, self.plans.task, blob)

        with closing(run.link.exchange(outgoing(), closed=self._closed)) as arriving:
            yield from arriving
        self._late = self._closed()

    def _heard_of(self, client: str) -> None:
        self._heard.add(client)
        if self._fits:
            self.plans.run.watch.answered(self.plans.number, client, len(self._heard))

    @property
    def _fits(self) -> bool:
        return self.plans.task == "fit"

    @property
    def _has_quorum(self) -> bool:
        return 0 < self.quorum <= self._valid

    def _closed(self) -> bool:
        return self.plans.run.clock() >= self.closes_at

    def _admit(self, client: str, answer: bytes) -> Admitted | Rejection:
        return admit(answer, expected=self.plans.expected(client, self.nonces[client]))

    def _counts(self, client: str, answer: bytes | Failure) -> bool:
        """Whether it is one of the quorum; to be asked once of each client's answer."""
        valid = (
            client in self.nonces
            and isinstance(answer, bytes)
            and isinstance(self._admit(client, answer), Admitted)
        )
        self._valid += valid
        return valid

    def _stray(self, client: str, failure: Failure) -> None:
        self.answers.refuse(client, self.plans.number, failure)

    def _absence(self) -> Failure:
        """Why a client has no answer, once nobody is waited for any more."""
        if self._has_quorum:
            reason = f"the round had {self.quorum} valid updates before"
        elif self._late:
            seconds = self.plans.run.job.rounds.deadline_s
            reason = f"the round was closed before, after rounds.deadline_s = {seconds:g}"
        else:
            return _SILENT
        return Failure(code=RejectionCode.LATE, reason=reason)


def until_quorum(
    answers: Generator[Answer], quorum: int, counts: Callable[[str, bytes | Failure], bool]
) -> Generator[Answer]:
    """Answers as they come, up to the one with which so many clients have one that counts.

    A second answer of a client never counts.
    """
    counted: set[str] = set()
    with closing(answers):
        for client, answer in answers:
            yield client, answer
            if client not in counted and counts(client, answer):
                counted.add(client)
            if len(counted) == quorum:
                return


def in_order(
    clients: Sequence[str],
    answers: Iterable[Answer],
    on_stray: Callable[[str, Failure], None],
    absence: Callable[[], Failure],
) -> Iterator[Answer]:
    """Answers in the order of `clients`, each as soon as those before it are there.

    A client that gave none has an `absence` in its place; a second answer, or one of a client that
    was not asked, goes to `on_stray`.
    """
    early: dict[str, bytes | Failure] = {}
    open_ = dict.fromkeys(clients)
    turn = 0
    for client, answer in answers:
        if client not in open_:
            on_stray(client, STRAY)
            continue
        del open_[client]
        early[client] = answer
        while turn < len(clients) and clients[turn] in early:
            yield clients[turn], early.pop(clients[turn])
            turn += 1
    for client in clients[turn:]:
        yield client, early.pop(client) if client in early else absence()


def finite(value: float | None) -> float | None:
    """None for NaN and infinity, which JSON has not; a note says so where it matters."""
    return value if value is not None and math.isfinite(value) else None
