# SPDX-License-Identifier: Apache-2.0
"""A round's secure sum: clients that have trained add up their updates, and only the sum is seen.

The state machine is that of `aggregation.secure_aggregation.server`; here its messages are sent and
answers handed to it, one stage after another. A client that is lost or at fault on the way becomes
a rejection; an attempt that cannot be opened leaves the round without updates, and says why.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from aggregation.codecs import SumCodec, round_seeds
from aggregation.codecs.common_grid import signed_sums, sum_bits
from aggregation.errors import SecureSumError
from aggregation.privacy.distributed_gaussian import noise_reach
from aggregation.secure_aggregation import (
    Aborted,
    Context,
    SecureSum,
    Stage,
    Task,
    Terms,
    Verifier,
    close_stage,
    new_context,
    open_attempt,
    receive,
)
from coordinator.exchange import Answers
from coordinator.link import Failure, Outgoing
from coordinator.plans import Plans
from coordinator.summing_noise import share_of
from protocol.keys import verifier
from protocol.rejection import RejectionCode
from protocol.summing import SumRequest, pack_sum_request

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summed:
    """What a secure sum came to."""

    mean: Mapping[str, np.ndarray]
    members: Sequence[str]
    sizes: Mapping[str, int]
    """Bytes that each client sent for it."""


def sum_updates(
    plans: Plans, clients: Sequence[str], codec: SumCodec, terms: Terms, answers: Answers
) -> Summed | str:
    """The mean update of those clients, all of whom have trained; or why there is none."""
    run, number = plans.run, plans.number
    spec = run.part(plans.roles.shares)
    variance = share_of(run.privacy, codec, spec)
    noise = noise_reach(variance, len(clients)) if variance is not None else 0
    nonce = secrets.token_bytes(16)
    task = Task(
        job=bytes.fromhex(run.hash),
        round=number,
        nonce=nonce,
        plan=plans.digest(),
        values=codec.length(spec),
        bits=sum_bits(codec.levels, len(clients), noise=noise),
    )
    try:
        context = new_context(task, clients, terms)
    except SecureSumError as error:
        return str(error)
    credentials = run.credentials(clients)
    attempt = _Attempt(plans=plans, answers=answers, credentials=credentials)
    found = attempt.play(context)
    if isinstance(found, Aborted):
        return f"{found.reason}: {found.detail}"
    seeds = round_seeds(run.hash, number)
    sums = signed_sums(found.values, task.bits, noise=noise)
    mean = codec.mean(sums, len(found.members), spec, seeds=seeds, noise=noise)
    return Summed(mean=mean, members=found.members, sizes=attempt.sizes)


class _Attempt:
    """One attempt at a sum: its messages, and what came of each client."""

    def __init__(self, *, plans: Plans, answers: Answers, credentials: Mapping[str, str]) -> None:
        self.sizes: dict[str, int] = {}
        self._plans = plans
        self._answers = answers
        self._credentials = credentials
        self._verify: Verifier = verifier(credentials)
        self._lost: set[str] = set()

    def play(self, context: Context) -> SecureSum | Aborted:
        """Stage after stage, to the sum or to where it was given up."""
        state, messages = open_attempt(context)
        while True:
            _log.info(
                "round %d: secure sum, %s asked for their %s",
                self._plans.number, len(messages), state.stage.name.lower(),
            )  # fmt: skip
            for client, answer in self._exchanged(messages, state.stage):
                if isinstance(answer, Failure):
                    self._refuse(client, answer)
                    continue
                state, fault = receive(state, client, answer, self._verify)
                if fault is not None and fault.dropped:
                    reason = f"in a secure sum: {fault.reason}: {fault.detail}"
                    self._refuse(client, Failure(code=RejectionCode.NOT_SUMMED, reason=reason))
            state, ended = close_stage(state)
            if isinstance(ended, SecureSum | Aborted):
                return ended
            messages = ended

    def _exchanged(
        self, messages: Mapping[str, bytes], stage: Stage
    ) -> Iterator[tuple[str, bytes | Failure]]:
        run, answers = self._plans.run, self._answers

        def outgoing() -> Iterator[Outgoing]:
            for client, message in messages.items():
                request = SumRequest(
                    job=run.hash,
                    round=self._plans.number,
                    client=client,
                    credentials=self._credentials if stage is Stage.KEYS else {},
                    message=message,
                )
                blob = pack_sum_request(request)
                answers.downlink_bytes += len(blob)
                yield Outgoing(client, "sum", blob)

        with closing(run.link.exchange(outgoing())) as arriving:
            for client, answer in arriving:
                if isinstance(answer, bytes):
                    answers.uplink_bytes += len(answer)
                    self.sizes[client] = self.sizes.get(client, 0) + len(answer)
                    answer = run.link.refused(client) or answer
                yield client, answer

    def _refuse(self, client: str, failure: Failure) -> None:
        """Note it once: who is lost is not asked again."""
        if client not in self._lost:
            self._lost.add(client)
            self._answers.refuse(client, self._plans.number, failure)
