# SPDX-License-Identifier: Apache-2.0
"""What a run is and what it has come to: the constant part, and the part that rounds move."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aggregation.codecs import Codec, codec_named
from aggregation.mergers import ONE_FACTOR, Merger, Roles, roles_of
from aggregation.secure_aggregation import Terms
from aggregation.selection import is_robust, term_smoothing
from aggregation.server_optimizers import ServerOptimizer
from coordinator.job import Job
from coordinator.journal import Journal
from coordinator.link import Link
from coordinator.privacy import Privacy
from coordinator.reports import RoundReport
from coordinator.server_memory import ServerMemory
from coordinator.watch import Watch
from protocol.factors import FactorPair, chosen
from protocol.tensors import ParamSpec, Tensors

Evaluate = Callable[[Tensors, Tensors], Mapping[str, float]]
"""The coordinator's own test of the global tensors, with the offset of frozen weights by their
names: {"accuracy": ..., "loss": ...}."""


Credentials = Callable[[Sequence[str]], Mapping[str, str]]
"""What shows other clients who these are, in PEM by their names: for secure sums."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What does not change from round to round."""

    job: Job
    hash: str
    spec: ParamSpec
    pairs: tuple[FactorPair, ...]
    initial: Tensors
    merger: Merger[Any]
    optimizer: ServerOptimizer
    privacy: Privacy | None
    """None where the job promises nothing."""
    seeds: Callable[[int], bytes]
    """A secret seed for the round of a number; asked once a round."""
    link: Link
    journal: Journal
    on_round: Callable[[RoundReport], None]
    evaluate: Evaluate
    streamed: Callable[[], tuple[int, int]]
    watch: Watch
    rejoin_s: float
    clock: Callable[[], float]
    pause: Callable[[float], None]
    credentials: Credentials

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
    def sums(self) -> Terms | None:
        """Of the job's secure sums; None where updates are seen one by one."""
        return self.job.privacy.terms

    @property
    def full_weight_samples(self) -> int:
        """Of clients whose weights are summed securely with their updates; 0: they are not."""
        aggregation = self.job.aggregation
        weighs = self.sums is not None and aggregation.weighting == "samples"
        return aggregation.full_weight_samples if weighs else 0

    @property
    def smoothing(self) -> float:
        """Of terms that clients make of their updates around a centre; 0: they do not."""
        return term_smoothing(self.merger) if self.sums is not None else 0.0

    @property
    def has_weights(self) -> bool:
        """Whether clients' weights are in the secure sum of a round."""
        return bool(self.full_weight_samples or self.smoothing)

    @property
    def tells_accuracy(self) -> bool:
        """Whether clients may be asked how they do on samples that they hold back."""
        return self.sums is None or "accuracy" in self.job.update.told

    @property
    def uplink(self) -> Codec:
        return codec_named(self.job.update.codec)


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What rounds have come to."""

    tensors: Mapping[str, np.ndarray]
    memory: ServerMemory
