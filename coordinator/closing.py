# SPDX-License-Identifier: Apache-2.0
"""The end of a round: the new tensors are tested, and everything is committed at once."""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from aggregation.mergers import Roles
from coordinator.downlink import broadcast
from coordinator.exchange import Answers, Exchange, finite
from coordinator.link import Failure
from coordinator.plans import Plans
from coordinator.reports import RoundReport
from coordinator.run import Run, State
from coordinator.selections import unselected
from protocol.controls import parted, without_controls
from protocol.rejection import RejectionCode


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """A round whose updates are merged."""

    number: int
    roles: Roles
    answers: Answers
    clients: int
    """As in `RoundReport`."""
    started: float
    fitted: float
    """When the last update was there; both by the run's clock."""
    notes: list[str]
    settled: Iterable[str]
    """Nonces that nothing more is expected of."""
    last: bool
    """Whether no round comes after it."""
    privacy: Mapping[str, Any] = field(default_factory=dict)
    """As in `RoundReport`."""
    staleness: Sequence[int] = ()
    """Of each merged update, where rounds are asynchronous."""


def close_round(
    run: Run, played: Played, state: State, *, busy: Collection[str] = ()
) -> RoundReport:
    """Test, commit and report; clients that are `busy` are not asked to test."""
    number, rounds, fit = played.number, run.job.rounds, played.answers
    offsets = state.memory.offsets
    stream_up, stream_down = run.streamed()
    notes = [*played.notes, *unselected(fit.selected)]
    if number == 1 and run.judges_factors_apart:
        notes.append(
            f"{run.job.aggregation.merger} judges the factors A and B side by side: what is robust "
            'of them need not be of their product; aggregation.factors = "up" trains B alone'
        )
    last = played.last
    tested: Mapping[str, float] = {}
    if last or number % rounds.evaluate_every == 0:
        tested = run.evaluate(parted(state.tensors)[0], offsets.weights(run.pairs))
        notes.extend(f"test: {name} is {x}" for name, x in tested.items() if finite(x) is None)
    clients_tested = Answers()
    every = rounds.evaluate_clients_every
    if run.job.data.held_out and run.tells_accuracy and (last or (every and number % every == 0)):
        clients_tested = _evaluate_clients(run, played, state, busy)
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
        + sum(run.streamed()),
        clients=played.clients,
        updates=len(fit.updates),
        samples=sum(update.samples for update in fit.updates),
        rejections=rejections,
        seconds=run.clock() - played.started,
        fit_seconds=played.fitted - played.started,
        per_client_accuracy=clients_tested.accuracy,
        per_client_local=clients_tested.local_accuracy,
        per_client_mixed=clients_tested.mixed_accuracy,
        selected=fit.selected,
        stream_up_bytes=stream_up,
        stream_down_bytes=stream_down,
        privacy=played.privacy,
        staleness_mean=sum(ages) / len(ages) if (ages := played.staleness) else None,
        staleness_max=max(ages) if ages else None,
        note="; ".join(notes),
    )
    run.journal.commit_round(
        run.hash,
        number,
        tensors=state.tensors,
        moments=state.memory.joined(),
        report=report.to_json(),
        updates=fit.updates,
        rejections=rejections,
        settled=played.settled,
    )
    run.on_round(report)
    return report


def closing_time(run: Run, started: float) -> float:
    """When a round that started then is closed, by the run's clock."""
    return started + (run.job.rounds.deadline_s or math.inf)


def _evaluate_clients(run: Run, played: Played, state: State, busy: Collection[str]) -> Answers:
    """Ask every client that is ready for its accuracy on the samples that it holds back."""
    answers, number, offsets = Answers(), played.number, state.memory.offsets
    said = run.link.survey(run.hash)
    clients = sorted(name for name in said if said[name].ready and name not in busy)
    # Nothing is built on what a client is tested with, so it goes whole.
    whole = replace(run.job.update, downlink="tensors", downlink_codec="float32")
    sent = broadcast(
        whole,
        without_controls(run.part(played.roles.sends)),
        state.tensors,
        job=run.hash,
        round=number,
        copy={},
        holders=frozenset(update.client for update in played.answers.updates),
        offsets=offsets,
        held_round=number,
        pairs=run.pairs,
        ranks=run.ranks,
    )
    exchange = Exchange(
        plans=Plans(run=run, number=number, task="evaluate", roles=played.roles, sent=sent),
        nonces={client: secrets.token_hex(16) for client in clients},
        answers=answers,
        closes_at=closing_time(run, run.clock()),
    )
    for admitted, _ in exchange.admitted():
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
            failure = Failure(code=RejectionCode.MALFORMED, reason=reason)
            answers.refuse(header.client, number, failure)
            continue
        for which, told in (
            ("accuracy", answers.accuracy),
            ("accuracy/local", answers.local_accuracy),
            ("accuracy/mixed", answers.mixed_accuracy),
        ):
            if which in found:
                told[header.client] = found[which]
    return answers
