# SPDX-License-Identifier: Apache-2.0
"""The point whose distances to all updates have the smallest sum, by smoothed Weiszfeld steps.

From the mean z, z ← Σ wᵢxᵢ / Σ wᵢ with wᵢ = 1 / max(ν, ‖z - xᵢ‖): what lies far away counts little,
and fewer than half of the clients can carry the point no further than a bound. All clients count
alike: an attacker chooses the number of samples that it claims, so weights are checked and not
used.

*Source* RFA: Pillutla, Kakade, Harchaoui, "Robust Aggregation for Federated Learning", 2019
(arXiv 1912.13445).
*Differs from source* clients count alike, where RFA weighs by samples. Its 3 or 4 steps spare
rounds of secure sums; here a step costs little, and 4 from a mean that f = 0.3 n clients carried
off by 10⁶ would end tens of thousands away: so up to 100, ended when a step is below 10⁻⁶ of the
median distance (RFA ends on the objective, of which the far ones make up the most).
*Cost* `iterations` passes over all updates; memory four float64 copies of the tensors, and one
float32 row an update, on disk beyond a budget.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from aggregation.gathered import Gathered, gathered, nothing_gathered, require_some
from aggregation.mergers.merger import Merged
from aggregation.robust.distances import squared_norm
from aggregation.settings import require_integer, require_number
from aggregation.vectors import shaped
from protocol.tensors import NOTHING, ParamSpec, Tensors

TOLERANCE: Final = 1e-6  # of the median distance


@dataclass(frozen=True, slots=True, kw_only=True)
class GeometricMedian:
    """Withstands f of n ≥ 2f + 1 clients."""

    name: ClassVar[str] = "geometric-median"
    sum_only: ClassVar[bool] = False  # by sums: masked_geometric_median.py
    exact: ClassVar[bool] = False
    order_independent: ClassVar[bool] = False

    smoothing: float = 1e-5  # ν, above 0: updates closer than this count as if they were this far
    iterations: int = 100  # at most, 1 or more

    def __post_init__(self) -> None:
        require_number("smoothing", self.smoothing, "a finite number above 0", lambda x: x > 0)
        require_integer("iterations", self.iterations, 1)

    def init(
        self, spec: ParamSpec, *, current: Tensors = NOTHING, memory: Tensors = NOTHING
    ) -> Gathered:
        """No rows."""
        return nothing_gathered(spec, memory)

    def add(self, state: Gathered, update: Tensors, weight: float, *, client: str = "") -> Gathered:
        """One update more; `weight` is checked and does not count."""
        return gathered(state, update, weight, client)

    def finish(self, state: Gathered) -> Merged:
        """The smoothed geometric median, or where the steps ended."""
        require_some(self.name, len(state))
        centre = np.zeros(state.spec.size)
        for row in state.rows:
            centre += row
        centre /= len(state)
        for _ in range(self.iterations):
            nearer, distances = self._step(state, centre)
            moved = math.sqrt(squared_norm(nearer - centre))
            centre = nearer
            if moved <= TOLERANCE * float(np.median(distances)):
                break
        return Merged(delta=shaped(state.spec, centre))

    def _step(self, state: Gathered, centre: np.ndarray) -> tuple[np.ndarray, list[float]]:
        """The next centre, and how far the updates lie from this one."""
        sums, total, distances = np.zeros(state.spec.size), 0.0, []
        for row in state.rows:
            distances.append(math.sqrt(squared_norm(row - centre)))
            weight = 1 / max(self.smoothing, distances[-1])
            sums += weight * row.astype(np.float64)
            total += weight
        sums /= total
        return sums, distances
