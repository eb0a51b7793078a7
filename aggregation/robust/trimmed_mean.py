# SPDX-License-Identifier: Apache-2.0
"""The mean of each value without its ⌊βn⌋ lowest and ⌊βn⌋ highest.

With β at or above the share of attackers, each value that is left lies among the honest ones. All
clients count alike: an attacker chooses the number of samples that it claims, so weights are
checked and not used.

*Source* Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
ICML 2018 (arXiv 1803.01498), the coordinate-wise trimmed mean.
*Differs from source* β is a share of the clients that came, rounded down: with fewer than 1/β of
them nothing is trimmed, and it is the plain mean.
*Cost* time n log n a value; memory one float32 row an update, on disk beyond a budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from aggregation.gathered import Gathered, gathered, nothing_gathered, require_some
from aggregation.mergers.merger import Merged
from aggregation.settings import require_number
from aggregation.vectors import shaped
from protocol.tensors import NOTHING, ParamSpec, Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class TrimmedMean:
    """Withstands ⌊share · n⌋ of n clients."""

    name: ClassVar[str] = "trimmed-mean"
    sum_only: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    order_independent: ClassVar[bool] = True  # sums run in the order of the sorted values

    share: float = 0.1  # β, of the clients, from each end; from 0 to below 0.5

    def __post_init__(self) -> None:
        require_number("share", self.share, "from 0 to below 0.5", lambda x: 0 <= x < 0.5)

    def init(
        self, spec: ParamSpec, *, current: Tensors = NOTHING, memory: Tensors = NOTHING
    ) -> Gathered:
        """No rows."""
        return nothing_gathered(spec, memory)

    def add(self, state: Gathered, update: Tensors, weight: float, *, client: str = "") -> Gathered:
        """One update more; `weight` is checked and does not count."""
        return gathered(state, update, weight, client)

    def finish(self, state: Gathered) -> Merged:
        """The trimmed mean of each value."""
        require_some(self.name, len(state))
        count = len(state)
        # 0.29 · 100 is 28.999… in floats; and one value at least is left, whatever the rounding
        cut = min(int(self.share * count + 1e-9), (count - 1) // 2)
        mean = np.empty(state.spec.size)
        for columns, block in state.rows.column_blocks():
            block.sort(axis=0)
            sums = block[cut : count - cut].sum(axis=0, dtype=np.float64)
            # 0 and -0 are equal to a sort; their sum must not depend on which came first
            mean[columns] = sums / (count - 2 * cut) + 0.0
        return Merged(delta=shaped(state.spec, mean))
