# SPDX-License-Identifier: Apache-2.0
"""The round loop: plan, exchange, admit, merge, step, journal, report.

It knows no Flower: a `Link` carries messages, here as in every deployment. Whatever a client does,
the round goes on; only the operator's side raises.

Updates are merged in the order of the clients' names, whatever order they come in, so that every
way to run clients gives the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from aggregation.errors import MergeError
from aggregation.mergers import COUNTS, Merged, Roles
from aggregation.selection import (
    merger_named,
    moves_base,
    needs_counts,
    server_optimizer_named,
)
from aggregation.server_optimizers import ServerOptimizer, ServerState
from coordinator.clients import choose_clients
from coordinator.downlink import Broadcast, broadcast
from coordinator.exchange import Answers, Run, exchange, finite
from coordinator.job import Job, dump_job
from coordinator.journal import Journal, UpdateEntry
from coordinator.link import Link
from coordinator.offsets import Offsets
from coordinator.reports import RoundReport
from coordinator.selections import selection_counts, unselected
from coordinator.server_memory import ServerMemory
from protocol.controls import joined, parted, with_controls, without_controls
from protocol.factors import FactorPair
from protocol.rejection import Rejection, RejectionCode
from protocol.tensors import ParamSpec, Tensors

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
    streamed: Callable[[], tuple[int, int]] = lambda: (0, 0),
    pairs: tuple[FactorPair, ...] = (),
    clock: Callable[[], float] = time.monotonic,
) -> Result:
    """Play a job's rounds, from where its journal stands, and give the final tensors.

    `on_round` is called after each round is committed. What it raises ends the run, which may be
    continued later with the same journal, and then gives the same tensors bit for bit. `choose_by`
    gives the accuracy of tensors on samples that are there for merging and not tested on.
    `streamed` gives the bytes that went up and down in split sessions since it was last asked.

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
    run = Run(job=job, hash=job.hash(), spec=spec, pairs=pairs, merger=merger, link=link)
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
        sent = broadcast(
            job.update,
            run.part(roles.sends),
            tensors,
            job=run.hash,
            round=number,
            copy=memory.downlink or initial,
            holders=journal.contributors(run.hash, number - 1),
            offsets=memory.offsets,
            held_round=number - 1,
            pairs=pairs,
            ranks=run.ranks,
        )
        current = {**tensors, **sent.seen}
        fit, merged = _fit(run, number, clients, roles, sent, current, memory.merger)
        memory = replace(memory, downlink=sent.seen if sent.keep else {})
        fit_seconds = clock() - started
        stream_up, stream_down = streamed()
        tensors, memory, notes = _merge(
            run, optimizer, fit, merged, tensors, memory, share=len(fit.updates) / len(known)
        )
        offsets = memory.offsets
        notes.extend(unselected(fit.selected))
        if number == 1 and run.judges_factors_apart:
            notes.append(
                f"{job.aggregation.merger} judges the factors A and B side by side: what is robust "
                'of them need not be of their product; aggregation.factors = "up" trains B alone'
            )
        last = number == job.rounds.count
        tested: Mapping[str, float] = {}
        if last or number % job.rounds.evaluate_every == 0:
            tested = evaluate(parted(tensors)[0], offsets.weights(pairs))
            notes.extend(f"test: {name} is {x}" for name, x in tested.items() if finite(x) is None)
        clients_tested = Answers()
        every = job.rounds.evaluate_clients_every
        if job.data.held_out and (last or (every and number % every == 0)):
            holders = frozenset(update.client for update in fit.updates)
            clients_tested = _evaluate_clients(run, number, roles, tensors, offsets, holders)
        rejections = (*fit.rejections, *clients_tested.rejections)
        report = RoundReport(
            round=number,
            accuracy=finite(tested.get("accuracy")),
            loss=finite(tested.get("loss")),
            train_loss=fit.mean_loss(),
            uplink_bytes=fit.uplink_bytes + stream_up,
            downlink_bytes=fit.downlink_bytes + stream_down,
            evaluation_bytes=clients_tested.uplink_bytes
            + clients_tested.downlink_bytes
            + sum(streamed()),
            clients=len(clients),
            updates=len(fit.updates),
            samples=sum(update.samples for update in fit.updates),
            rejections=rejections,
            seconds=clock() - started,
            fit_seconds=fit_seconds,
            per_client_accuracy=clients_tested.accuracy,
            per_client_local=clients_tested.local_accuracy,
            per_client_mixed=clients_tested.mixed_accuracy,
            selected=fit.selected,
            stream_up_bytes=stream_up,
            stream_down_bytes=stream_down,
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


def _merge(
    run: Run,
    optimizer: ServerOptimizer,
    fit: Answers,
    merged: Any,
    tensors: Tensors,
    memory: ServerMemory,
    *,
    share: float,
) -> tuple[Tensors, ServerMemory, list[str]]:
    """The next tensors, what is remembered of them, and notes; where updates cannot be merged all
    stays as it is, and a note says why.

    `merged` is the merger's state, `share` how much of all clients it is of.
    """
    least = run.job.rounds.min_updates
    if len(fit.updates) < least:
        missing = (
            f"tensors unchanged: {len(fit.updates)} valid updates, rounds.min_updates asks for "
            f"{least}"
        )
        return tensors, memory.moved({}), [missing]
    try:
        result: Merged = run.merger.finish(merged)
        delta = _shared_controls(result.delta, share)
        state, after = optimizer.step(ServerState(run.spec, memory.optimizer), tensors, delta)
    except MergeError as error:
        # Finite updates may still add up to what float32 cannot hold: a client's doing, which must
        # not end the run, though it cannot be said whose.
        return tensors, memory.moved({}), [f"tensors unchanged: {error}"]
    remembered = replace(memory, optimizer=state.moments, merger=result.memory)
    return after, remembered.moved(result.base), list(result.notes)


def server_optimizer(job: Job) -> ServerOptimizer:
    """The optimizer that the job names."""
    settings = job.aggregation
    return server_optimizer_named(
        settings.server_optimizer,
        learning_rate=settings.server_learning_rate,
        adaptivity=settings.server_adaptivity,
    )


def _fit(
    run: Run,
    number: int,
    clients: Sequence[str],
    roles: Roles,
    sent: Broadcast,
    current: Tensors,
    memory: Tensors,
) -> tuple[Answers, Any]:
    """One exchange of plans and updates; every valid update is merged as its turn comes.

    Gives the merger's state as well. `current`: all tensors, as clients start from them.
    """
    answers = Answers()
    merged = run.merger.init(run.spec, current=current, memory=memory)
    shared = run.part(roles.shares)
    # What clients do not share has not changed.
    still = {
        name: np.zeros(entry.shape, entry.dtype)
        for name, entry in run.spec.entries
        if name not in shared
    }
    uniform = run.job.aggregation.weighting == "uniform"
    for admitted, size in exchange(run, number, "fit", clients, roles, sent, answers):
        header = admitted.header
        weight = 1.0 if uniform else float(header.samples)
        try:
            update = {**admitted.delta, **still}
            counts = selection_counts(header.metrics, run.elements)
            if needs_counts(run.merger) and counts:
                update[COUNTS] = np.array(counts)
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
        if counts:
            answers.selected[header.client] = counts
    return answers, merged


def _shared_controls(delta: Tensors, share: float) -> dict[str, np.ndarray]:
    """SCAFFOLD: control variates move by the mean over all clients, of which `share` took part."""
    changes, controls = parted(delta)
    return joined(changes, {name: np.float32(share) * value for name, value in controls.items()})


def _evaluate_clients(
    run: Run,
    number: int,
    roles: Roles,
    tensors: Tensors,
    offsets: Offsets,
    holders: frozenset[str],
) -> Answers:
    """Ask every client for its accuracy on the samples that it holds back."""
    answers = Answers()
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
    for admitted, _ in exchange(run, number, "evaluate", clients, roles, sent, answers):
        header = admitted.header
        # A client that holds nothing back answers without metrics, and has no accuracy.
        found = {
            which: header.metrics[which]
            for which in ("accuracy", "accuracy/local", "accuracy/mixed")
            if which in header.metrics
        }
        wrong = [value for value in found.values() if not 0 <= value <= 1]
        if wrong:
            reason = f"answer: expected an accuracy of 0 to 1, found {wrong[0]:g}"
            code = RejectionCode.MALFORMED
            answers.rejections.append(
                Rejection(client=header.client, round=number, code=code, reason=reason)
            )
            continue
        for which, told in (
            ("accuracy", answers.accuracy),
            ("accuracy/local", answers.local_accuracy),
            ("accuracy/mixed", answers.mixed_accuracy),
        ):
            if which in found:
                told[header.client] = found[which]
    return answers
