# SPDX-License-Identifier: Apache-2.0
"""The mean of updates whose norms are cut to a bound: x·min(1, M/‖x‖), then the mean.

A client may still choose the direction of its update, but not how far it carries: a bound on what
one can do, not a defence against many. The norm is that of the whole update, all tensors together.
All clients count alike: an attacker chooses the number of samples that it claims, so weights are
checked and not used.

*Source* as a defence Sun et al., "Can You Really Backdoor Federated Learning?", 2019
(arXiv 1911.07963); without the noise that may be added there.
*Differs from source* `bound` 0 takes the median of the round's norms, which needs all updates at
once; a fixed bound streams.
*Cost* time linear in each update. Memory with a fixed bound two float64 copies of the tensors,
however many clients; otherwise one float32 row an update, on disk beyond a budget.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from aggregation.gathered import Gathered, checked_row, gathered, nothing_gathered, require_some
from aggregation.mergers.merger import Merged
from aggregation.mergers.weighted_mean import MeanState
from aggregation.robust.distances import squared_norm
from aggregation.settings import require_number
from aggregation.vectors import checked_weight, require_floats, shaped
from protocol.tensors import NOTHING, ParamSpec, Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class NormBound:
    """Mean of bounded updates; no client moves it by more than bound / n_clients."""

    name: ClassVar[str] = "norm-bound"
    sum_only: ClassVar[bool] = False  # the sums are of bounded updates: someone must see each one
    exact: ClassVar[bool] = False
    order_independent: ClassVar[bool] = False

    bound: float = 0.0  # M, l2 norm of an update; 0: the median of the round's norms

    def __post_init__(self) -> None:
        require_number("bound", self.bound, "a finite number of 0 or above", lambda x: x >= 0)

    def init(
        self, spec: ParamSpec, *, current: Tensors = NOTHING, memory: Tensors = NOTHING
    ) -> MeanState | Gathered:
        """Zero sums, or no rows where the bound is taken from the round."""
        if self.bound == 0:
            return nothing_gathered(spec, memory)
        require_floats(spec)
        return MeanState(spec=spec, sums=np.zeros(spec.size), weight=0.0, count=0)

    def add(
        self, state: MeanState | Gathered, update: Tensors, weight: float, *, client: str = ""
    ) -> MeanState | Gathered:
        """One update more; `weight` is checked and does not count."""
        if isinstance(state, Gathered):
            return gathered(state, update, weight, client)
        checked_weight(weight)
        vector = checked_row(state.spec, update)
        vector *= _factor(math.sqrt(squared_norm(vector)), self.bound)
        vector += state.sums
        return MeanState(
            spec=state.spec, sums=vector, weight=state.weight + 1, count=state.count + 1
        )

    def finish(self, state: MeanState | Gathered) -> Merged:
        """The mean of the bounded updates."""
        if not isinstance(state, Gathered):
            require_some(self.name, state.count)
            return Merged(delta=shaped(state.spec, state.sums / state.count))
        require_some(self.name, len(state))
        norms = [math.sqrt(squared_norm(row)) for row in state.rows]
        bound = float(np.median(norms))
        sums = np.zeros(state.spec.size)
        for norm, row in zip(norms, state.rows, strict=True):
            sums += row.astype(np.float64) * _factor(norm, bound)
        return Merged(delta=shaped(state.spec, sums / len(state)))


def _factor(norm: float, bound: float) -> float:
    return 1.0 if norm <= bound else bound / norm
