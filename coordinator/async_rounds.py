# SPDX-License-Identifier: Apache-2.0
"""Asynchronous rounds: the server steps whenever its buffer is full, and waits for nobody.

*Source* Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022
(arXiv 2106.06639), algorithm 1 (FedBuff): a client trains from the tensors that were current when
it was asked; the server collects K updates and takes one step; an update that is τ steps old has
the weight (1+τ)^-e, e = 1/2.

*Differs from source* Updates are weighted by samples as well, and their mean is over the weights,
Σwᵢ·Δᵢ / Σwᵢ, where the paper divides by K: updates that are all equally old count in full, so that
the server's learning rate means what it does in synchronous rounds. A step is taken with fewer
than K when nobody is left to ask.

A round, in the journal and in reports, is one step; a plan's round is the version that its client
starts from. After a crash steps that were committed stay, and kept answers are used once; clients
that were at work are asked anew, from the tensors that are current then. Which updates meet in a
step depends on when they come, so that a run that was interrupted does not give the same bits.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np

from coordinator.admission import admit
from coordinator.closing import Played, close_round
from coordinator.downlink import broadcast
from coordinator.exchange import STRAY
from coordinator.gathering import able_clients, gather
from coordinator.link import Failure, Outgoing
from coordinator.merging import Step
from coordinator.plans import Plans
from coordinator.run import Run, State
from protocol.rejection import Rejection, RejectionCode


@dataclass(frozen=True, slots=True)
class _Ask:
    """What a client is at work on, or has answered."""

    client: str
    plans: Plans
    nonce: str


class AsyncRounds:
    """The steps of one run, from where its journal stands."""

    def __init__(self, run: Run, done: int, state: State) -> None:
        self._run = run
        self._state = state
        self._able: list[str] = []
        self._known = 0
        self._at_work: dict[str, _Ask] = {}
        self._unsent: dict[str, bytes] = {}
        """Answers in the buffer, by nonce, where the journal does not keep them."""
        self._number = done + 1
        if self._number <= run.job.rounds.count:
            self._open()
            self._recall()

    def play(self) -> State:
        """Take every step that is left; the state after the last."""
        run, last = self._run, self._run.job.rounds.count
        while self._number <= last:
            if not self._is_full():
                self._able, members = gather(run, self._number)
                self._known = len(members)
                self._begin()
                with closing(run.link.exchange(self._outgoing())) as arriving:
                    for client, answer in arriving:
                        self._take(client, answer)
                        if not self._is_full():
                            continue
                        if self._number == last:
                            break
                        self._close()
                        self._look_again()
                        self._begin()
            # A step that nobody could be asked in has not been taken: it waits.
            if self._heard:
                self._close()
        return self._state

    def _begin(self) -> None:
        """Note the step in the journal, before plans of it go out."""
        run, number = self._run, self._number
        if run.journal.resume_round(run.hash, number) is None:
            # Whose plans are on their way is no part of it: after a crash others may be asked.
            run.journal.begin_round(run.hash, number, {}, self._known)

    def _open(self) -> None:
        """Begin a step: its tensors are the version that clients get from now on."""
        run, memory, number = self._run, self._state.memory, self._number
        roles = run.roles(memory.merger)
        sent = broadcast(
            run.job.update,
            run.part(roles.sends),
            self._state.tensors,
            job=run.hash,
            round=number,
            copy=run.initial,
            holders=(),
            offsets=memory.offsets,
            pairs=run.pairs,
        )
        self._plans = Plans(run=run, number=number, task="fit", roles=roles, sent=sent)
        current = {**self._state.tensors, **sent.seen}
        self._step = Step(run, number, roles, current, memory.merger)
        self._started = run.clock()
        self._buffer: list[_Ask] = []
        self._settled: list[str] = []
        self._heard = 0
        self._times: Counter[str] = Counter()
        self._put_off: set[str] = set()

    def _recall(self) -> None:
        """Take up the answers that came before a crash, and that no step has used."""
        for kept in self._run.journal.kept_answers(self._run.hash):
            plans = replace(self._plans, number=kept.round)
            self._times[kept.client] += kept.round == self._number
            self._heard += 1
            _, answer = self._run.journal.kept_answer(kept.nonce)
            self._weigh(_Ask(kept.client, plans, kept.nonce), answer)

    def _is_full(self) -> bool:
        return len(self._buffer) >= self._run.job.rounds.buffer

    def _outgoing(self) -> Iterator[Outgoing | None]:
        """Plans for clients that are free, as long as there are places; it ends when nobody is at
        work and nobody is left to ask."""
        most = self._run.job.rounds.concurrency
        while True:
            free = [c for c in self._able if c not in self._at_work and c not in self._put_off]
            if not free and not self._at_work:
                return
            if not free or 0 < most <= len(self._at_work):
                yield None
            else:
                yield self._ask(free)

    def _ask(self, free: list[str]) -> Outgoing:
        """One of the free clients, drawn evenly, and its plan."""
        run, asked = self._run, self._times.total()
        drawn = np.random.default_rng([run.seed, self._number, asked]).integers(len(free))
        client = sorted(free)[drawn]
        ask = _Ask(client, self._plans, secrets.token_hex(16))
        # Whoever is asked twice from the same tensors must not train on the same batches twice.
        draw = self._number + self._times[client] * run.job.rounds.count
        blob = self._plans.plan(client, ask.nonce, draw=draw)
        self._times[client] += 1
        self._at_work[client] = ask
        self._step.answers.downlink_bytes += len(blob)
        run.watch.asked(self._number, [client])
        return Outgoing(client, "fit", blob)

    def _take(self, client: str, answer: bytes | Failure) -> None:
        """What came for a client; whoever failed is not asked again before the next step."""
        ask = self._at_work.pop(client, None)
        self._heard += ask is not None
        if ask is None:
            self._step.answers.refuse(client, self._number, STRAY)
        elif isinstance(answer, Failure):
            self._put_off.add(client)
            self._step.answers.refuse(client, self._number, answer)
        else:
            run, most = self._run, ask.plans.expected(client, ask.nonce).max_bytes
            if run.journal.keeps_answers and len(answer) <= most:
                run.journal.keep_answer(run.hash, ask.plans.number, client, ask.nonce, answer)
            self._weigh(ask, answer)
            run.watch.answered(self._number, client, len(self._buffer))

    def _weigh(self, ask: _Ask, answer: bytes) -> None:
        """Into the buffer, or out."""
        answers, most = self._step.answers, self._run.job.rounds.max_staleness
        answers.uplink_bytes += len(answer)
        self._settled.append(ask.nonce)
        verdict = admit(answer, expected=ask.plans.expected(ask.client, ask.nonce))
        if isinstance(verdict, Rejection):
            self._put_off.add(ask.client)
            answers.rejections.append(replace(verdict, round=self._number))
        elif 0 < most < self._age(ask):
            reason = f"it is {self._age(ask)} steps old, rounds.max_staleness allows {most}"
            late = Failure(code=RejectionCode.LATE, reason=reason)
            answers.refuse(ask.client, self._number, late)
        else:
            self._buffer.append(ask)
            if not self._run.journal.keeps_answers:
                self._unsent[ask.nonce] = answer

    def _age(self, ask: _Ask) -> int:
        """τ: steps since the version that it was asked from."""
        return self._number - ask.plans.number

    def _close(self) -> None:
        """Take a step with what is in the buffer, and begin the next."""
        run, rounds = self._run, self._run.job.rounds
        fitted = run.clock()
        ages = self._merge()
        after, notes = self._step.finish(self._state, share=1.0)
        if self._number == 1:
            notes.append(
                "asynchronous: a step adds the mean of its updates, each weighted by "
                f"{run.job.aggregation.weighting} x (1 + staleness)^-{rounds.staleness_exponent:g}"
            )
        if self._number == rounds.count and self._at_work:
            notes.append(f"{len(self._at_work)} clients were still at work at the end")
        played = Played(
            number=self._number,
            roles=self._plans.roles,
            answers=self._step.answers,
            clients=self._heard,
            started=self._started,
            fitted=fitted,
            notes=notes,
            settled=self._settled,
            last=self._number == rounds.count,
            staleness=ages,
        )
        close_round(run, played, after, busy=self._at_work.keys())
        self._state = after
        self._number += 1
        if self._number <= rounds.count:
            self._open()

    def _merge(self) -> list[int]:
        """Merge the buffer, in the order in which it was filled; the ages of what is in it."""
        run, ages = self._run, []
        exponent = run.job.rounds.staleness_exponent
        for ask in self._buffer:
            if refused := run.link.refused(ask.client):
                self._step.answers.refuse(ask.client, self._number, refused)
                continue
            kept = self._unsent.pop(ask.nonce, None)
            answer = run.journal.kept_answer(ask.nonce)[1] if kept is None else kept
            admitted = admit(answer, expected=ask.plans.expected(ask.client, ask.nonce))
            if isinstance(admitted, Rejection):
                raise AssertionError(f"the same bytes were admitted before: {admitted}")
            before = len(self._step.answers.updates)
            self._step.add(admitted, len(answer), share=(1.0 + self._age(ask)) ** -exponent)
            if len(self._step.answers.updates) > before:
                ages.append(self._age(ask))
        return ages

    def _look_again(self) -> None:
        """Who else can take part by now; whoever is at work cannot say so and still can."""
        said = self._run.link.survey(self._run.hash)
        able, _ = able_clients(self._run, said)
        working = [client for client in self._able if client in self._at_work]
        self._able, self._known = sorted({*able, *working}), len(said)
