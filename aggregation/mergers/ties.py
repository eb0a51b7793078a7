# SPDX-License-Identifier: Apache-2.0
"""Keep the largest values of each update, elect a sign for each value, average those that agree.

*Source* Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023
(arXiv 2306.01708), and its authors' code (prateeky2806/ties-merging): of each update, all tensors
together, the `density` share of largest magnitude stays; the sign of a value is that of the sum of
the trimmed updates, and where that is 0 the sign that most values have; the mean is over those
updates whose value has that sign; all of it is scaled by λ.
*Differs from source* exactly ⌊density · size⌋ values stay, 1 at least, of equal magnitudes those
that come first; the authors' code keeps one more, and all that equal the last. Where as many values
have one sign as the other, those whose sum is 0 stay 0. The source has no weights: here they weigh
the sum that elects and the mean of those that agree, and equal ones change nothing.

Clients of one task are not tasks: on evenly spread data this is near the mean, with what is small
and what a minority found left out.
*Cost* three passes over all updates; memory two float64 copies of the tensors, and one float32 row
an update, on disk beyond a budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from aggregation.gathered import (
    Gathered,
    checked_row,
    nothing_gathered,
    require_some,
    with_row,
)
from aggregation.mergers.merger import Merged
from aggregation.settings import require_number
from aggregation.vectors import checked_weight, shaped
from protocol.tensors import NOTHING, ParamSpec, Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class TIES:
    """TIES-Merging of a round's updates."""

    name: ClassVar[str] = "ties"
    sum_only: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    order_independent: ClassVar[bool] = False

    density: float = 0.2  # share of an update's values that stays, above 0 and at most 1
    scaling: float = 1.0  # λ, above 0

    def __post_init__(self) -> None:
        require_number("density", self.density, "above 0 and at most 1", lambda x: 0 < x <= 1)
        require_number("scaling", self.scaling, "a finite number above 0", lambda x: x > 0)

    def init(
        self, spec: ParamSpec, *, current: Tensors = NOTHING, memory: Tensors = NOTHING
    ) -> Gathered:
        """No rows."""
        return nothing_gathered(spec, memory)

    def add(self, state: Gathered, update: Tensors, weight: float, *, client: str = "") -> Gathered:
        """One update more, trimmed."""
        factor = checked_weight(weight)
        vector = checked_row(state.spec, update)
        # 0.29 · 100 is 28.999… in floats
        count = max(1, int(self.density * vector.size + 1e-9))
        return with_row(state, largest_only(vector, count), factor, client)

    def finish(self, state: Gathered) -> Merged:
        """The mean of those that agree, scaled."""
        require_some(self.name, len(state))
        # of the largest, so that equal weights are 1 and change no bit
        weights = np.array(state.weights) / max(state.weights)
        signs = np.empty(state.spec.size, np.int8)
        for columns, block in state.rows.column_blocks():
            signs[columns] = np.sign(weights @ block.astype(np.float64))
        signs[signs == 0] = np.sign(signs.sum(dtype=np.int64))
        merged = np.zeros(state.spec.size)
        for columns, block in state.rows.column_blocks():
            agreeing = weights[:, None] * (np.sign(block) == signs[columns])
            total = agreeing.sum(axis=0)
            sums = (agreeing * block).sum(axis=0)
            np.divide(sums, total, out=merged[columns], where=total > 0)
        return Merged(delta=shaped(state.spec, merged * self.scaling))


def largest_only(vector: np.ndarray, count: int) -> np.ndarray:
    """A copy in which all but the `count` values of largest magnitude are 0; of equal magnitudes
    those that come first stay."""
    if count >= vector.size:
        return vector.copy()
    sizes = np.abs(vector)
    least = np.partition(sizes, vector.size - count)[vector.size - count]
    stays = sizes > least
    equal = np.flatnonzero(sizes == least)
    stays[equal[: count - np.count_nonzero(stays)]] = True
    return np.where(stays, vector, 0)
