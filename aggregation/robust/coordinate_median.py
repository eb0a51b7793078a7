# SPDX-License-Identifier: Apache-2.0
"""The median of the updates, value by value.

Fewer than half of the clients cannot carry a value beyond what the others sent for it. All clients
count alike: an attacker chooses the number of samples that it claims, so weights are checked and
not used.

*Source* Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
ICML 2018 (arXiv 1803.01498), the coordinate-wise median. Of an even number it is the mean of the
middle two.
*Cost* time n log n a value; memory one float32 row an update, on disk beyond a budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from aggregation.gathered import Gathered, gathered, nothing_gathered, require_some
from aggregation.mergers.merger import Merged
from aggregation.vectors import shaped
from protocol.tensors import NOTHING, ParamSpec, Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinateMedian:
    """Withstands f of n ≥ 2f + 1 clients."""

    name: ClassVar[str] = "median"
    sum_only: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    order_independent: ClassVar[bool] = True

    def init(
        self, spec: ParamSpec, *, current: Tensors = NOTHING, memory: Tensors = NOTHING
    ) -> Gathered:
        """No rows."""
        return nothing_gathered(spec, memory)

    def add(self, state: Gathered, update: Tensors, weight: float, *, client: str = "") -> Gathered:
        """One update more; `weight` is checked and does not count."""
        return gathered(state, update, weight, client)

    def finish(self, state: Gathered) -> Merged:
        """The median of each value."""
        require_some(self.name, len(state))
        median = np.empty(state.spec.size)
        for columns, block in state.rows.column_blocks():
            median[columns] = sorted_median(np.sort(block, axis=0))
        return Merged(delta=shaped(state.spec, median))


def sorted_median(ordered: np.ndarray) -> np.ndarray:
    """float64 [columns], of rows [n, columns] that are sorted in each column."""
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    # 0 and -0 are equal to a sort, so which comes first depends on the order of updates
    return (low.astype(np.float64) + high) / 2 + 0.0
