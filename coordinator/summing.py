# SPDX-License-Identifier: Apache-2.0
"""A round's secure sum: clients that have trained add up their updates, and only the sum is seen.

The state machine is that of `aggregation.secure_aggregation.server`; here its messages are sent and
answers handed to it, one stage after another. A client that is lost or at fault on the way becomes
a rejection; an attempt that cannot be opened leaves the round without updates, and says why.

Clients open one sum of a round and no other, so that a sum is in the journal before anything is
done with it, and whoever goes on with the round takes it from there.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from aggregation.codecs import SumCodec, round_seeds
from aggregation.codecs.common_grid import signed_sums, sum_bits
from aggregation.errors import CodecError, SecureSumError
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
from aggregation.summed_weights import FULL, digit_count, summed_weight
from coordinator.exchange import Answers
from coordinator.journal import OpenedSum
from coordinator.link import Failure, Outgoing
from coordinator.plans import Plans
from coordinator.run import Run
from coordinator.summing_noise import share_of
from protocol.keys import verifier
from protocol.rejection import RejectionCode
from protocol.summing import SumRequest, pack_sum_request
from protocol.tensors import ParamSpec
from protocol.update import UpdateHeader

_log = logging.getLogger(__name__)


Trained = tuple[UpdateHeader, int]
"""What a client answered, and the bytes that it sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summed:
    """What a secure sum came to."""

    mean: Mapping[str, np.ndarray]
    members: Mapping[str, Trained]
    """In the order of their names."""


def sum_updates(
    plans: Plans, trained: Mapping[str, Trained], codec: SumCodec, terms: Terms, answers: Answers
) -> Summed | str:
    """The mean update of those clients, all of whom have trained; or why there is none.

    Of a round whose sum was opened before a crash it is that sum's, whoever has trained.
    """
    run, number = plans.run, plans.number
    opened = run.journal.opened_sum(run.hash, number)
    if opened is None:
        found = _opened(plans, trained, codec, terms, answers)
        if isinstance(found, str):
            return found
        opened = found
        run.journal.keep_sum(run.hash, number, opened)
    else:
        answers.rejections.extend(opened.rejections)
        answers.uplink_bytes += opened.uplink_bytes
        answers.downlink_bytes += opened.downlink_bytes
    try:
        mean = _mean(opened, run, number, codec, run.part(plans.roles.shares))
    except CodecError as error:
        # Somebody added what is no update. Nobody can say who.
        return str(error)
    return Summed(mean=mean, members=opened.members)


def _mean(
    opened: OpenedSum, run: Run, number: int, codec: SumCodec, spec: ParamSpec
) -> dict[str, np.ndarray]:
    """Of the members' updates, weighted where the sum has weights. Raises: CodecError."""
    count, split = len(opened.members), codec.length(spec)
    seeds = round_seeds(run.hash, number)
    noise = _reach(run, codec, spec, count)
    sums = signed_sums(opened.values[:split], opened.bits, noise=noise)
    mean = codec.mean(sums, count, spec, seeds=seeds, noise=noise)
    if not run.has_weights:
        return mean
    # The mean of w·x, over that of w.
    factor = count * FULL / summed_weight(opened.values[split:], count, codec.levels)
    return {name: value * np.float32(factor) for name, value in mean.items()}


def _reach(run: Run, codec: SumCodec, spec: ParamSpec, clients: int) -> int:
    """How far the noise of so many clients takes a sum, in steps."""
    variance = share_of(run.privacy, codec, spec)
    return noise_reach(variance, clients) if variance is not None else 0


def _opened(
    plans: Plans, trained: Mapping[str, Trained], codec: SumCodec, terms: Terms, answers: Answers
) -> OpenedSum | str:
    """One attempt at a sum, and all that is known of the round when it is opened."""
    run, number = plans.run, plans.number
    spec, clients = run.part(plans.roles.shares), sorted(trained)
    weights = digit_count(codec.levels) if run.has_weights else 0
    nonce = secrets.token_bytes(16)
    task = Task(
        job=bytes.fromhex(run.hash),
        round=number,
        nonce=nonce,
        plan=plans.digest(),
        values=codec.length(spec) + weights,
        bits=sum_bits(codec.levels, len(clients), noise=_reach(run, codec, spec, len(clients))),
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
    members = {}
    for client in found.members:
        header, size = trained[client]
        members[client] = (header, size + attempt.sizes[client])
    return OpenedSum(
        values=found.values,
        bits=task.bits,
        members=members,
        rejections=answers.rejections,
        uplink_bytes=answers.uplink_bytes,
        downlink_bytes=answers.downlink_bytes,
    )


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
