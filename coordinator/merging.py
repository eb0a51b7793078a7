# SPDX-License-Identifier: Apache-2.0
"""From the updates of one step to the next tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from aggregation.codecs import SumCodec
from aggregation.errors import MergeError, PrivacyError
from aggregation.mergers import COUNTS, Merged, Merger, Roles
from aggregation.robust import MaskedGeometricMedian
from aggregation.secure_aggregation import Terms
from aggregation.selection import needs_counts, server_optimizer_named
from aggregation.server_optimizers import ServerOptimizer, ServerState
from coordinator.admission import Admitted
from coordinator.exchange import Answers
from coordinator.job import Job
from coordinator.journal import UpdateEntry
from coordinator.link import Failure
from coordinator.plans import Plans
from coordinator.privacy import PrivateRound
from coordinator.run import Run, State
from coordinator.selections import selection_counts
from coordinator.summing import sum_updates
from protocol.controls import joined, parted
from protocol.plan import UNCLIPPED
from protocol.rejection import RejectionCode
from protocol.tensors import Tensors
from protocol.update import UpdateHeader


def server_optimizer(job: Job) -> ServerOptimizer:
    """The optimizer that the job names."""
    settings = job.aggregation
    return server_optimizer_named(
        settings.server_optimizer,
        learning_rate=settings.server_learning_rate,
        adaptivity=settings.server_adaptivity,
    )


class Step:
    """The updates of one server step, merged one by one, as their turn comes."""

    def __init__(
        self,
        run: Run,
        number: int,
        roles: Roles,
        current: Tensors,
        memory: Tensors,
        private: PrivateRound | None = None,
    ) -> None:
        """`current`: all tensors, as clients start from them. `memory`: the merger's."""
        self.answers = Answers()
        self._notes: list[str] = []
        self.unclipped: float | None = None
        """The noised share of updates that were not clipped, once it is finished."""
        self._run = run
        self._number = number
        shared = run.part(roles.shares)
        self._private = private
        self._unclipped = 0
        noised = private.merger(shared) if private else None
        self._counts = noised is None
        """Whether it may be seen how many updates came."""
        self._merger: Merger[Any] = noised or run.merger
        self._merged: Any = self._merger.init(run.spec, current=current, memory=memory)
        # What clients do not share has not changed.
        self._still = {
            name: np.zeros(entry.shape, entry.dtype)
            for name, entry in run.spec.entries
            if name not in shared
        }

    def add(self, admitted: Admitted, size: int, *, share: float = 1.0) -> None:
        """Merge an update of `size` bytes, with `share` of the weight that the job gives it."""
        run, answers, header = self._run, self.answers, admitted.header
        uniform = run.job.aggregation.weighting == "uniform"
        most = run.job.aggregation.full_weight_samples or header.samples
        weight = share * (1.0 if uniform else float(min(header.samples, most)))
        if self._private and (reason := self._private.fault(header.metrics)):
            malformed = Failure(code=RejectionCode.MALFORMED, reason=reason)
            answers.refuse(header.client, self._number, malformed)
            return
        try:
            update = {**admitted.delta, **self._still}
            counts = selection_counts(header.metrics, run.elements)
            if needs_counts(run.merger) and counts:
                update[COUNTS] = np.array(counts)
            self._merged = self._merger.add(self._merged, update, weight, client=header.client)
        except (MergeError, PrivacyError) as error:
            problem = Failure(code=RejectionCode.NOT_FINITE, reason=str(error))
            answers.refuse(header.client, self._number, problem)
            return
        self._count(header, size)

    def add_sum(self, plans: Plans, terms: Terms, trained: Sequence[tuple[Admitted, int]]) -> None:
        """Merge the mean that a secure sum of those clients comes to, weighted in the sum itself or
        not at all.

        `trained`: their answers to the plans, which hold no tensors, and their sizes; nobody's are
        needed where the journal has the sum.
        """
        codec = self._run.uplink
        if not isinstance(codec, SumCodec):
            raise MergeError(f"expected a codec whose payloads can be summed, found {codec.name}")
        headers = {admitted.header.client: (admitted.header, size) for admitted, size in trained}
        summed = sum_updates(plans, headers, codec, terms, self.answers)
        if isinstance(summed, str):
            self._notes.append(f"no secure sum: {summed}")
            return
        update = {**summed.mean, **self._still}
        if steps := isinstance(self._merger, MaskedGeometricMedian):
            self._merged = self._merger.add_step(self._merged, update)
        for client, (header, size) in summed.members.items():
            if not steps:
                # As often as there are clients: rules that count updates get their number.
                self._merged = self._merger.add(self._merged, update, 1.0, client=client)
            self._count(header, size)

    def _count(self, header: UpdateHeader, size: int) -> None:
        answers = self.answers
        self._unclipped += header.metrics.get(UNCLIPPED) == 1
        answers.updates.append(
            UpdateEntry(
                nonce=header.nonce, client=header.client, samples=header.samples, bytes=size
            )
        )
        if "loss" in header.metrics:
            answers.losses.append((header.metrics["loss"], header.samples))
        if counts := selection_counts(header.metrics, self._run.elements):
            answers.selected[header.client] = counts

    def finish(self, state: State, *, share: float) -> tuple[State, list[str]]:
        """The next tensors, what is remembered of them, and notes; where updates cannot be merged
        all stays as it is, and a note says why.

        `share`: of all clients, how many the updates are of.
        """
        run, found = self._run, len(self.answers.updates)
        tensors, memory = state.tensors, state.memory
        if self._private is not None:
            self.unclipped = self._private.unclipped_share(self._merged, self._unclipped)
            memory = replace(memory, privacy=self._private.remembered(self.unclipped))
        least = run.job.rounds.min_updates
        if found < least and self._counts:
            missing = (
                f"tensors unchanged: {found} valid updates, rounds.min_updates asks for {least}"
            )
            return State(tensors=tensors, memory=memory.moved({})), [*self._notes, missing]
        try:
            result: Merged = self._merger.finish(self._merged)
            delta = _shared_controls(result.delta, share)
            kept, after = run.optimizer.step(
                ServerState(run.spec, memory.optimizer), tensors, delta
            )
        except MergeError as error:
            # Finite updates may still add up to what float32 cannot hold: a client's doing, which
            # must not end the run, though it cannot be said whose.
            return State(tensors=tensors, memory=memory.moved({})), [f"tensors unchanged: {error}"]
        remembered = replace(memory, optimizer=kept.moments, merger=result.memory)
        return State(tensors=after, memory=remembered.moved(result.base)), [
            *self._notes,
            *result.notes,
        ]


def _shared_controls(delta: Tensors, share: float) -> Mapping[str, np.ndarray]:
    """SCAFFOLD: control variates move by the mean over all clients, of which `share` took part."""
    changes, controls = parted(delta)
    return joined(changes, {name: np.float32(share) * value for name, value in controls.items()})
