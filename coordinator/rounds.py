# SPDX-License-Identifier: Apache-2.0
"""The round loop: plan, exchange, admit, merge, step, journal, report.

It knows no Flower: a `Link` carries messages, here as in every deployment. Whatever a client does,
the round goes on; only the operator's side raises.

Updates are merged in the order of the clients' names, whatever order they come in, so that every
way to run clients gives the same bits. One that comes early waits, encoded, for those before it: at
most the updates of one round, and none where a link answers in order.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from aggregation.codecs import Codec, codec_named, round_seeds
from aggregation.errors import MergeError
from aggregation.mergers import ONE_FACTOR, BaseChange, Merged, Merger, Roles, roles_of
from aggregation.offsets import arrays_of
from aggregation.selection import merger_named, moves_base, server_optimizer_named
from aggregation.server_optimizers import ServerOptimizer, ServerState
from coordinator.admission import Admitted, Expected, admit
from coordinator.clients import choose_clients, client_seed
from coordinator.downlink import Broadcast, broadcast
from coordinator.job import Job, dump_job
from coordinator.journal import Journal, UpdateEntry
from coordinator.link import Failure, Link, Outgoing
from coordinator.offsets import Offsets
from coordinator.reports import RoundReport
from coordinator.server_memory import ServerMemory
from protocol.controls import joined, parted, with_controls, without_controls
from protocol.factors import FactorPair, at_rank, chosen
from protocol.plan import Plan, pack_plan
from protocol.rejection import Rejection, RejectionCode
from protocol.tensors import ParamSpec, Tensors
from protocol.update import MAX_UPDATE_OVERHEAD

Task = Literal["fit", "evaluate"]
Evaluate = Callable[[Tensors, Tensors], Mapping[str, float]]
"""The coordinator's own test of the global tensors, with the offset of frozen weights by their
names: {"accuracy": ..., "loss": ...}."""


class Result(NamedTuple):
    """What a job's rounds come to."""

    tensors: Mapping[str, np.ndarray]
    offset: Mapping[str, np.ndarray]
    """How far frozen weights have moved, by their names; {} for most mergers."""


def run_rounds(
    job: Job,
    spec: ParamSpec,
    initial: Tensors,
    link: Link,
    journal: Journal,
    on_round: Callable[[RoundReport], None],
    evaluate: Evaluate,
    *,
    choose_by: Callable[[Tensors], float] | None = None,
    pairs: tuple[FactorPair, ...] = (),
    clock: Callable[[], float] = time.monotonic,
) -> Result:
    """Play a job's rounds, from where its journal stands, and give the final tensors.

    `on_round` is called after each round is committed. What it raises ends the run, which may be
    continued later with the same journal, and then gives the same tensors bit for bit. `choose_by`
    gives the accuracy of tensors on samples that are there for merging and not tested on.

    Raises: NoClientsError, JournalError; MergeError for tensors that do not fit `spec`.
    """
    if problem := spec.mismatch(initial):
        raise MergeError(f"initial tensors: {problem}")
    merger = merger_named(job.aggregation.merger, pairs, choose_by)
    if moves_base(merger) and (nameless := [pair.down for pair in pairs if not pair.base]):
        raise MergeError(
            f'merger "{job.aggregation.merger}": expected a frozen weight [out, in] beside every '
            f'pair of factors, "{nameless[0]}" has none; take another merger'
        )
    if job.training.scaffold:
        spec = with_controls(spec)
        zeros = {name: np.zeros_like(value) for name, value in initial.items()}
        initial = joined(initial, zeros)
    run = _Run(job=job, hash=job.hash(), spec=spec, pairs=pairs, merger=merger, link=link)
    optimizer = server_optimizer(job)
    done, tensors = journal.open_run(run.hash, dump_job(job), initial)
    moments = journal.moments(run.hash, done)
    memory = (
        ServerMemory.parted(moments)
        if moments
        else ServerMemory(optimizer=optimizer.init(spec).moments)
    )
    for number in range(done + 1, job.rounds.count + 1):
        started = clock()
        journal.begin_round(run.hash, number)
        known = link.node_ids()
        clients = choose_clients(known, job.rounds.clients_per_round, run.seed, number)
        roles = run.roles(memory.merger)
        offsets = memory.offsets
        sent = broadcast(
            job.update,
            run.part(roles.sends),
            tensors,
            job=run.hash,
            round=number,
            copy=memory.downlink or initial,
            holders=journal.contributors(run.hash, number - 1),
            offsets=offsets,
            held_round=number - 1,
            pairs=pairs,
            ranks=run.ranks,
        )
        current = {**tensors, **sent.seen}
        fit, merged = _fit(run, number, clients, roles, sent, current, memory.merger)
        memory = replace(memory, downlink=sent.seen if sent.keep else {})
        fit_seconds = clock() - started
        notes = []
        change: Mapping[str, BaseChange] = {}
        if len(fit.updates) < job.rounds.min_updates:
            notes.append(
                f"tensors unchanged: {len(fit.updates)} valid updates, "
                f"rounds.min_updates asks for {job.rounds.min_updates}"
            )
        else:
            try:
                result: Merged = run.merger.finish(merged)
                notes.extend(result.notes)
                delta = _shared_controls(result.delta, len(fit.updates) / len(known))
                state, tensors = optimizer.step(ServerState(spec, memory.optimizer), tensors, delta)
                memory = replace(memory, optimizer=state.moments, merger=result.memory)
                change = result.base
            except MergeError as error:
                # Finite updates may still add up to what float32 cannot hold: a client's doing,
                # which must not end the run, though it cannot be said whose.
                notes.append(f"tensors unchanged: {error}")
        offsets = offsets.after(change)
        memory = replace(memory, offset=offsets.held, change=arrays_of(offsets.change))
        last = number == job.rounds.count
        tested: Mapping[str, float] = {}
        if last or number % job.rounds.evaluate_every == 0:
            tested = evaluate(parted(tensors)[0], offsets.weights(pairs))
            notes.extend(f"test: {name} is {x}" for name, x in tested.items() if _finite(x) is None)
        clients_tested = _Answers()
        every = job.rounds.evaluate_clients_every
        if job.data.held_out and (last or (every and number % every == 0)):
            holders = frozenset(update.client for update in fit.updates)
            clients_tested = _evaluate_clients(run, number, roles, tensors, offsets, holders)
        rejections = (*fit.rejections, *clients_tested.rejections)
        report = RoundReport(
            round=number,
            accuracy=_finite(tested.get("accuracy")),
            loss=_finite(tested.get("loss")),
            train_loss=fit.mean_loss(),
            uplink_bytes=fit.uplink_bytes,
            downlink_bytes=fit.downlink_bytes,
            evaluation_bytes=clients_tested.uplink_bytes + clients_tested.downlink_bytes,
            clients=len(clients),
            updates=len(fit.updates),
            samples=sum(update.samples for update in fit.updates),
            rejections=rejections,
            seconds=clock() - started,
            fit_seconds=fit_seconds,
            per_client_accuracy=clients_tested.accuracy,
            note="; ".join(notes),
        )
        journal.commit_round(
            run.hash,
            number,
            tensors=tensors,
            moments=memory.joined(),
            report=report.to_json(),
            updates=fit.updates,
            rejections=rejections,
        )
        on_round(report)
    return Result(parted(tensors)[0], memory.offsets.weights(pairs))


def server_optimizer(job: Job) -> ServerOptimizer:
    """The optimizer that the job names."""
    settings = job.aggregation
    return server_optimizer_named(
        settings.server_optimizer,
        learning_rate=settings.server_learning_rate,
        adaptivity=settings.server_adaptivity,
    )


def in_order(
    clients: Sequence[str],
    answers: Iterable[tuple[str, bytes | Failure]],
    on_stray: Callable[[str, Failure], None],
) -> Iterator[tuple[str, bytes | Failure]]:
    """Answers in the order of `clients`, each as soon as those before it are there.

    A client that gave none gets a Failure in its place; a second answer, or one of a client that
    was not asked, goes to `on_stray`.
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
        silent = Failure(code=RejectionCode.NO_REPLY, reason="no answer came")
        yield client, early.pop(client, silent)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
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
    def ranks(self) -> tuple[int, ...]:
        """The ranks that clients' factors may have; () for the bundle's own."""
        return self.job.aggregation.client_ranks

    @property
    def uplink(self) -> Codec:
        return codec_named(self.job.update.codec)


@dataclass(slots=True, kw_only=True)
class _Answers:
    """What one exchange has given so far: the loop's own notebook, never handed out."""

    updates: list[UpdateEntry] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    losses: list[tuple[float, int]] = field(default_factory=list)
    accuracy: dict[str, float] = field(default_factory=dict)
    uplink_bytes: int = 0
    downlink_bytes: int = 0

    def mean_loss(self) -> float | None:
        """The clients' training losses, weighted by samples; None when nobody told one."""
        if not self.losses:
            return None
        weight = sum(samples for _, samples in self.losses)
        mean = math.fsum(loss * samples / weight for loss, samples in self.losses)
        # Metrics are finite each, yet a hostile one may be near the largest float.
        return _finite(mean)


def _fit(
    run: _Run,
    number: int,
    clients: Sequence[str],
    roles: Roles,
    sent: Broadcast,
    current: Tensors,
    memory: Tensors,
) -> tuple[_Answers, Any]:
    """One exchange of plans and updates; every valid update is merged as its turn comes.

    Gives the merger's state as well. `current`: all tensors, as clients start from them.
    """
    answers = _Answers()
    merged = run.merger.init(run.spec, current=current, memory=memory)
    shared = run.part(roles.shares)
    # What clients do not share has not changed.
    still = {
        name: np.zeros(entry.shape, entry.dtype)
        for name, entry in run.spec.entries
        if name not in shared
    }
    uniform = run.job.aggregation.weighting == "uniform"
    for admitted, size in _exchange(run, number, "fit", clients, roles, sent, answers):
        header = admitted.header
        weight = 1.0 if uniform else float(header.samples)
        try:
            update = {**admitted.delta, **still}
            merged = run.merger.add(merged, update, weight, client=header.client)
        except MergeError as error:
            code, reason = RejectionCode.NOT_FINITE, str(error)
            answers.rejections.append(
                Rejection(client=header.client, round=number, code=code, reason=reason)
            )
            continue
        entry = UpdateEntry(
            nonce=header.nonce, client=header.client, samples=header.samples, bytes=size
        )
        answers.updates.append(entry)
        if "loss" in header.metrics:
            answers.losses.append((header.metrics["loss"], header.samples))
    return answers, merged


def _shared_controls(delta: Tensors, share: float) -> dict[str, np.ndarray]:
    """SCAFFOLD: control variates move by the mean over all clients, of which `share` took part."""
    changes, controls = parted(delta)
    return joined(changes, {name: np.float32(share) * value for name, value in controls.items()})


def _evaluate_clients(
    run: _Run,
    number: int,
    roles: Roles,
    tensors: Tensors,
    offsets: Offsets,
    holders: frozenset[str],
) -> _Answers:
    """Ask every client for its accuracy on the samples that it holds back."""
    answers = _Answers()
    clients = sorted(run.link.node_ids())
    # Nothing is built on what a client is tested with, so it goes whole.
    whole = replace(run.job.update, downlink="tensors", downlink_codec="float32")
    sent = broadcast(
        whole,
        without_controls(run.part(roles.sends)),
        tensors,
        job=run.hash,
        round=number,
        copy={},
        holders=holders,
        offsets=offsets,
        held_round=number,
        pairs=run.pairs,
        ranks=run.ranks,
    )
    for admitted, _ in _exchange(run, number, "evaluate", clients, roles, sent, answers):
        # A client that holds nothing back answers without metrics, and has no accuracy.
        header = admitted.header
        accuracy = header.metrics.get("accuracy", 0.0)
        if not 0 <= accuracy <= 1:
            reason = f"answer: expected an accuracy of 0 to 1, found {accuracy:g}"
            code = RejectionCode.MALFORMED
            answers.rejections.append(
                Rejection(client=header.client, round=number, code=code, reason=reason)
            )
        elif "accuracy" in header.metrics:
            answers.accuracy[header.client] = accuracy
    return answers


def _finite(value: float | None) -> float | None:
    """None for NaN and infinity, which JSON has not; a note says so where it matters."""
    return value if value is not None and math.isfinite(value) else None


def _exchange(
    run: _Run,
    number: int,
    task: Task,
    clients: Sequence[str],
    roles: Roles,
    sent: Broadcast,
    answers: _Answers,
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
                rank=parcel.rank,
                offset_round=parcel.offset_round,
                offset_ranks=parcel.offset_ranks,
                seed=client_seed(run.seed, number, client),
                max_update_bytes=budgets[parcel.rank],
            )
            blob = pack_plan(plan, parcel.payload)
            answers.downlink_bytes += len(blob)
            yield Outgoing(client, task, blob)

    def refuse(client: str, failure: Failure) -> None:
        answers.rejections.append(
            Rejection(client=client, round=number, code=failure.code, reason=failure.reason)
        )

    for client, answer in in_order(clients, run.link.exchange(outgoing()), refuse):
        if isinstance(answer, Failure):
            refuse(client, answer)
            continue
        answers.uplink_bytes += len(answer)
        rank = sent.rank_of(client)
        expected = Expected(
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
        verdict = admit(answer, expected=expected)
        if isinstance(verdict, Rejection):
            answers.rejections.append(verdict)
        else:
            yield verdict, len(answer)
