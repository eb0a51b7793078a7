# SPDX-License-Identifier: Apache-2.0
"""The round loop: gather, plan, exchange, admit, merge, step, journal, report.

It knows no Flower: a `Link` carries messages, here as in every deployment. Whatever a client does,
the round goes on; only the operator's side raises.

Updates are merged in the order of the clients' names, whatever order they come in, so that every
way to run clients gives the same bits, and so does a run that is gone on with after a crash. Rounds
that are asynchronous are played in `async_rounds.py`, and promise less.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from aggregation.errors import MergeError
from aggregation.privacy.keystream import new_seed
from aggregation.robust import MaskedGeometricMedian
from aggregation.selection import merger_named, moves_base
from coordinator.async_rounds import AsyncRounds
from coordinator.clients import choose_clients
from coordinator.closing import Played, close_round, closing_time
from coordinator.downlink import broadcast
from coordinator.errors import JobError, JournalConflictError
from coordinator.exchange import Exchange
from coordinator.gathering import gather, rejoin
from coordinator.job import Job, dump_job
from coordinator.journal import Journal, Start
from coordinator.link import Link
from coordinator.merging import Step, server_optimizer
from coordinator.plans import Plans
from coordinator.privacy import Privacy, PrivateRound
from coordinator.reports import RoundReport
from coordinator.run import Credentials, Evaluate, Run, State
from coordinator.server_memory import ServerMemory
from coordinator.summing_noise import noise_faults
from coordinator.summing_rules import reach_faults
from coordinator.watch import Unattended, Watch
from protocol.controls import joined, parted, with_controls
from protocol.factors import FactorPair
from protocol.tensors import ParamSpec, Tensors


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
    watch: Watch | None = None,
    rejoin_s: float = 0.0,
    seeds: Callable[[int], bytes] = lambda number: new_seed(),
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
    credentials: Credentials = lambda clients: {},
) -> Result:
    """Play a job's rounds, from where its journal stands, and give the final tensors.

    Args:
        on_round: called after each round is committed. What it raises ends the run, which may be
            continued later with the same journal, and then gives the same tensors bit for bit
            (asynchronous rounds: nothing is lost or counted twice).
        choose_by: the accuracy of tensors on samples that are there for merging and not tested on.
        streamed: bytes that went up and down in split sessions since it was last asked.
        watch: told of what happens; None: a round that would have to wait for clients ends the run.
        rejoin_s: seconds in which all clients of a round that is played again may come back before
            it goes on without some of them.
        seeds: of a private round's draw and noise, by its number. What it gives has to be as secret
            as the default's, or the job's guarantee is that of one whose seeds are.
        pause: sleeps for so many seconds between two looks at who is there; it may raise to end
            the run, as `on_round` may.
        credentials: of clients, for jobs with secure sums.

    A private job whose budget is used up ends early.

    Raises: NoClientsError, JournalError; MergeError for tensors that do not fit `spec`; JobError
        for a privacy that cannot be met, before anybody is asked.
    """
    privacy = Privacy.of(job)
    if faults := [*reach_faults(job, spec), *noise_faults(job, privacy, spec)]:
        raise JobError(faults)
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
    run = Run(
        job=job,
        hash=job.hash(),
        spec=spec,
        pairs=pairs,
        initial=initial,
        merger=merger,
        optimizer=server_optimizer(job),
        privacy=privacy,
        seeds=seeds,
        link=link,
        journal=journal,
        on_round=on_round,
        evaluate=evaluate,
        streamed=streamed,
        watch=watch or Unattended(),
        rejoin_s=rejoin_s,
        clock=clock,
        pause=pause,
        credentials=credentials,
    )
    done, tensors = journal.open_run(run.hash, dump_job(job), initial)
    moments = journal.moments(run.hash, done)
    memory = (
        ServerMemory.parted(moments)
        if moments
        else ServerMemory(optimizer=run.optimizer.init(spec).moments)
    )
    state = State(tensors=tensors, memory=memory)
    if job.rounds.mode == "async":
        state = AsyncRounds(run, done, state).play()
    else:
        for number in range(done + 1, job.rounds.count + 1):
            if privacy and not privacy.affords(journal.charges(run.hash), number):
                break
            state = _play_round(run, number, state)
    return Result(parted(state.tensors)[0], state.memory.offsets.weights(pairs))


def _play_round(run: Run, number: int, state: State) -> State:
    rounds, memory = run.job.rounds, state.memory
    start = _start(run, number, state)
    private = _private(run, number)
    started = run.clock()
    roles = run.roles(memory.merger)
    spec, tensors = run.part(roles.sends), state.tensors
    if isinstance(run.merger, MaskedGeometricMedian) and run.smoothing:
        spec = with_controls(spec)
        tensors = joined(tensors, run.merger.centre(run.spec, memory.merger))
    sent = broadcast(
        run.job.update,
        spec,
        tensors,
        job=run.hash,
        round=number,
        copy=memory.downlink or run.initial,
        holders=run.journal.contributors(run.hash, number - 1),
        offsets=memory.offsets,
        held_round=number - 1,
        pairs=run.pairs,
        ranks=run.ranks,
    )
    step = Step(run, number, roles, {**state.tensors, **sent.seen}, memory.merger, private)
    plans = Plans(run=run, number=number, task="fit", roles=roles, sent=sent, private=private)
    exchange = Exchange(
        plans=plans,
        nonces=start.nonces,
        answers=step.answers,
        closes_at=closing_time(run, started),
        quorum=rounds.enough if rounds.enough < len(start.nonces) else 0,
    )
    if run.sums is None:
        for admitted, size in exchange.admitted():
            step.add(admitted, size)
    else:
        opened = run.journal.keeps_sum(run.hash, number)
        step.add_sum(plans, run.sums, [] if opened else list(exchange.admitted()))
    fitted = run.clock()
    held = State(
        tensors=state.tensors,
        memory=replace(memory, downlink=sent.seen if sent.keep else {}),
    )
    after, notes = step.finish(held, share=len(step.answers.updates) / start.known)
    last = number == rounds.count
    told: Mapping[str, Any] = {}
    if private is not None:
        charges = run.journal.charges(run.hash)
        told = private.report(charges, step.unclipped)
        if number == 1 and (strange := private.privacy.miscounted(start.known)):
            notes.append(strange)
        if not last and not private.privacy.affords(charges, number + 1):
            last = True
            notes.append(
                f"the privacy budget of epsilon = {private.privacy.section.epsilon:g} is used up: "
                f"rounds {number + 1} to {rounds.count} are not played"
            )
    played = Played(
        number=number,
        roles=roles,
        answers=step.answers,
        clients=len(start.nonces),
        started=started,
        fitted=fitted,
        notes=notes,
        settled=start.nonces.values(),
        last=last,
        privacy=told,
    )
    close_round(run, played, after)
    return after


def _private(run: Run, number: int) -> PrivateRound | None:
    """What the round was charged for as it began."""
    if run.privacy is None:
        return None
    charge = run.journal.charges(run.hash)[-1:]
    if not charge or charge[0].round != number or not charge[0].seed:
        raise JournalConflictError(f"round {number}: expected that its privacy is charged for")
    return PrivateRound(privacy=run.privacy, charge=charge[0])


def _start(run: Run, number: int, state: State) -> Start:
    """Who is asked in a round: in one that was begun before, those that were asked then."""
    start = run.journal.resume_round(run.hash, number)
    if start is None:
        able, members = gather(run, number)
        charge, drawn, most = None, None, run.job.rounds.asked
        if run.privacy is not None:
            charge = run.privacy.charge(number, state.memory.privacy, run.seeds(number))
            drawn = run.privacy.draw(members, charge.seed)
            most = run.privacy.most_asked
        if drawn is not None:
            # Of all, and not of those who can: who is there is not drawn.
            clients = [client for client in drawn if client in set(able)]
        else:
            clients = choose_clients(able, most, run.seed, number)
        nonces = {client: secrets.token_hex(16) for client in clients}
        return run.journal.begin_round(run.hash, number, nonces, len(members), charge=charge)
    if run.journal.keeps_sum(run.hash, number):
        return start
    # Whoever has answered is needed again where what was trained is yet to be summed.
    sums = run.sums is not None
    needed = [c for c, nonce in start.nonces.items() if sums or not run.journal.keeps(nonce)]
    if needed:
        rejoin(run, number, needed, len(start.nonces) - len(needed))
    return start
