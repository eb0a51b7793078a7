# SPDX-License-Identifier: Apache-2.0
"""One exchange: plans go out, and what comes back is admitted, in the order of the clients' names.

An answer that comes early waits, encoded, for those before it: at most the updates of one round,
and none where a link answers in order.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal

from aggregation.codecs import Codec, codec_named, round_seeds
from aggregation.mergers import ONE_FACTOR, Merger, Roles, roles_of
from aggregation.selection import is_robust
from coordinator.admission import Admitted, Expected, admit
from coordinator.clients import client_seed
from coordinator.downlink import Broadcast
from coordinator.job import Job
from coordinator.journal import UpdateEntry
from coordinator.link import Failure, Link, Outgoing
from protocol.factors import FactorPair, at_rank, chosen
from protocol.plan import Plan, pack_plan
from protocol.rejection import Rejection, RejectionCode
from protocol.tensors import ParamSpec, Tensors
from protocol.update import MAX_UPDATE_OVERHEAD

Task = Literal["fit", "evaluate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What does not change from round to round."""

    job: Job
    hash: str
    spec: ParamSpec
    pairs: tuple[FactorPair, ...]
    merger: Merger[Any]
    link: Link

    def roles(self, memory: Tensors) -> Roles:
        """Which tensors the round is about that starts from the merger's memory."""
        return ONE_FACTOR if self.job.aggregation.factors == "up" else roles_of(self.merger, memory)

    def part(self, choice: str) -> ParamSpec:
        """The tensors that a word of the plan means."""
        return chosen(choice, self.spec, self.pairs)

    @property
    def seed(self) -> int:
        return self.job.job.seed

    @property
    def judges_factors_apart(self) -> bool:
        """A robust rule sees both factors of pairs that clients train both of."""
        both = self.job.aggregation.factors == "both"
        return both and bool(self.pairs) and is_robust(self.merger)

    @property
    def elements(self) -> int:
        """Of the pool that clients select from; 0 for a method without one."""
        # Every tensor of a pool has the elements as its first axis.
        _, entry = self.spec.entries[0]
        return entry.shape[0] if self.job.method.name == "fedins" else 0

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that clients' factors may have; () for the bundle's own."""
        return self.job.aggregation.client_ranks

    @property
    def uplink(self) -> Codec:
        return codec_named(self.job.update.codec)


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

    def mean_loss(self) -> float | None:
        """The clients' training losses, weighted by samples; None when nobody told one."""
        if not self.losses:
            return None
        weight = sum(samples for _, samples in self.losses)
        mean = math.fsum(loss * samples / weight for loss, samples in self.losses)
        # Metrics are finite each, yet a hostile one may be near the largest float.
        return finite(mean)


def exchange(
    run: Run,
    number: int,
    task: Task,
    clients: Sequence[str],
    roles: Roles,
    sent: Broadcast,
    answers: Answers,
) -> Iterator[tuple[Admitted, int]]:
    """Send plans and admit what comes back, in the order of `clients`, with its size in bytes.

    Bytes are those handed to the link and got from it, containers with their headers.
    """
    specs = {
        rank: at_rank(rank, run.part(roles.shares), run.pairs) if task == "fit" else None
        for rank in sent.whole
    }
    budgets = {
        rank: (run.uplink.payload_bytes(spec) if spec else 0) + MAX_UPDATE_OVERHEAD
        for rank, spec in specs.items()
    }
    nonces = {client: secrets.token_hex(16) for client in clients}

    def outgoing() -> Iterator[Outgoing]:
        for client in clients:
            parcel = sent.for_client(client)
            plan = Plan(
                job=run.hash,
                round=number,
                nonce=nonces[client],
                client=client,
                downlink_codec=parcel.codec,
                uplink_codec=run.uplink.name,
                task=task,
                learning_rate=run.job.training.learning_rate,
                local_epochs=run.job.training.local_epochs,
                local_steps=run.job.training.local_steps,
                error_feedback=run.job.update.error_feedback,
                base_round=parcel.base_round,
                keep=sent.keep,
                sends=roles.sends,
                trains=roles.trains,
                shares=roles.shares,
                tells=run.job.update.told,
                mix=run.job.personal.mix if run.job.personal.report else None,
                rank=parcel.rank,
                offset_round=parcel.offset_round,
                offset_ranks=parcel.offset_ranks,
                seed=client_seed(run.seed, number, client),
                max_update_bytes=budgets[parcel.rank],
            )
            blob = pack_plan(plan, parcel.payload)
            answers.downlink_bytes += len(blob)
            yield Outgoing(client, task, blob)

    def expected(client: str) -> Expected:
        rank = sent.rank_of(client)
        return Expected(
            job=run.hash,
            round=number,
            nonce=nonces[client],
            client=client,
            codec=run.uplink.name,
            spec=specs[rank],
            max_bytes=budgets[rank],
            max_samples=run.job.aggregation.max_client_samples,
            seeds=round_seeds(run.hash, number),
        )

    def counts(client: str, answer: bytes | Failure) -> bool:
        return client in nonces and not (
            isinstance(answer, Failure)
            or isinstance(admit(answer, expected=expected(client)), Rejection)
        )

    def refuse(client: str, failure: Failure) -> None:
        answers.rejections.append(
            Rejection(client=client, round=number, code=failure.code, reason=failure.reason)
        )

    arriving = run.link.exchange(outgoing())
    silent = Failure(code=RejectionCode.NO_REPLY, reason="no answer came")
    quorum = run.job.rounds.quorum if task == "fit" else 0
    if 0 < quorum < len(clients):
        arriving = until_quorum(arriving, quorum, counts)
        silent = Failure(
            code=RejectionCode.LATE, reason=f"the round had {quorum} valid updates before"
        )
    for client, answer in in_order(clients, arriving, refuse, silent):
        if isinstance(answer, Failure):
            refuse(client, answer)
            continue
        answers.uplink_bytes += len(answer)
        verdict = admit(answer, expected=expected(client))
        if isinstance(verdict, Rejection):
            answers.rejections.append(verdict)
        else:
            yield verdict, len(answer)


def until_quorum(
    answers: Generator[tuple[str, bytes | Failure]],
    quorum: int,
    counts: Callable[[str, bytes | Failure], bool],
) -> Generator[tuple[str, bytes | Failure]]:
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
    answers: Iterable[tuple[str, bytes | Failure]],
    on_stray: Callable[[str, Failure], None],
    silent: Failure,
) -> Iterator[tuple[str, bytes | Failure]]:
    """Answers in the order of `clients`, each as soon as those before it are there.

    A client that gave none gets `silent` in its place; a second answer, or one of a client that was
    not asked, goes to `on_stray`.
    """
    early: dict[str, bytes | Failure] = {}
    open_ = dict.fromkeys(clients)
    turn = 0
    for client, answer in answers:
        if client not in open_:
            reason = "answered again, or without having been asked"
            on_stray(client, Failure(code=RejectionCode.DUPLICATE, reason=reason))
            continue
        del open_[client]
        early[client] = answer
        while turn < len(clients) and clients[turn] in early:
            yield clients[turn], early.pop(clients[turn])
            turn += 1
    for client in clients[turn:]:
        yield client, early.pop(client, silent)


def finite(value: float | None) -> float | None:
    """None for NaN and infinity, which JSON has not; a note says so where it matters."""
    return value if value is not None and math.isfinite(value) else None
