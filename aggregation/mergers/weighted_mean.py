# SPDX-License-Identifier: Apache-2.0
"""The weighted mean of the updates, as they come.

*Source* McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized
Data", AISTATS 2017 (arXiv 1602.05629), algorithm 1: w ← Σ nₖ wₖ / Σ nₖ.
*Cost* time linear in each update; memory two float64 copies of the tensors, however many clients.
Sums are float64 in the order of `add`: one order gives one result, bit for bit; another order
may differ in the last bit of a float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from aggregation.errors import MergeError
from aggregation.mergers.merger import NOTHING, Merged
from aggregation.vectors import checked_weight, flat, named, require_floats, shaped
from protocol.tensors import ParamSpec, Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanState:
    """What has been added."""

    spec: ParamSpec
    sums: np.ndarray  # float64 [size], Σ weight · tensor, in name order
    weight: float  # Σ weight
    count: int  # updates


@dataclass(frozen=True, slots=True)
class WeightedMean:
    """Streaming weighted mean."""

    sum_only: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    order_independent: ClassVar[bool] = False

    def init(
        self, spec: ParamSpec, *, current: Tensors = NOTHING, memory: Tensors = NOTHING
    ) -> MeanState:
        """Zero sums."""
        require_floats(spec)
        return MeanState(spec=spec, sums=np.zeros(spec.size), weight=0.0, count=0)

    def add(
        self, state: MeanState, update: Tensors, weight: float, *, client: str = ""
    ) -> MeanState:
        """One update more; `weight` is finite and above 0."""
        factor = checked_weight(weight)
        if problem := state.spec.mismatch(update):
            raise MergeError(f"cannot merge: {problem}")
        sums = flat(state.spec, update)
        with np.errstate(over="ignore", invalid="ignore"):  # refused by name, just below
            sums *= factor
            sums += state.sums
        if not np.isfinite(sums).all():
            first = next(
                name for name, part in named(state.spec, sums) if not np.isfinite(part).all()
            )
            raise MergeError(
                f'tensor "{first}": expected values whose weighted sum is finite, found NaN or '
                f"infinity (weight {factor:g}); check updates before they are merged"
            )
        total_weight = state.weight + factor
        if not math.isfinite(total_weight):
            raise MergeError(f"weight: expected a finite sum of weights, {factor:g} is too large")
        return MeanState(spec=state.spec, sums=sums, weight=total_weight, count=state.count + 1)

    def finish(self, state: MeanState) -> Merged:
        """Sums over total weight, in the dtypes of the spec."""
        if state.count == 0:
            raise MergeError("weighted mean: expected one update or more, nothing was added")
        return Merged(delta=shaped(state.spec, state.sums / state.weight))
