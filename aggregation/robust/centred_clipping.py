# SPDX-License-Identifier: Apache-2.0
"""What the last round came to, moved by the mean of what updates differ from it, each clipped.

v ← v + mean(clip(xᵢ - v, τ)), where clip(d, τ) = d·min(1, τ/‖d‖), a few times; v starts where the
last round ended, in the first round at 0. A client moves v by at most τ/n a step. All clients count
alike: an attacker chooses the number of samples that it claims, so weights are checked and not
used.

*Source* Karimireddy, He, Jaggi, "Learning from History for Byzantine Robust Optimization", ICML
2021 (arXiv 2012.10333). The source has clients send momenta, so that few of their differences from
v are noise; here they send changes.
*Differs from source* `radius` 0 takes, in each step, the median distance of the updates to v: where
fewer than half lie, it is never above the largest honest distance. The source gives τ as a number.
*Cost* one pass over all updates a step, two with radius 0; memory four float64 copies of the
tensors, and one float32 row an update, on disk beyond a budget. `memory` holds v, float64, as
"centre/NAME".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from aggregation.gathered import Gathered, gathered, nothing_gathered, require_some
from aggregation.mergers.merger import Merged
from aggregation.robust.centres import kept_centre, last_centre
from aggregation.robust.distances import squared_norm
from aggregation.settings import require_integer, require_number
from aggregation.vectors import shaped
from protocol.tensors import NOTHING, ParamSpec, Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class CentredClipping:
    """Withstands fewer than half; the fewer, the closer it comes in `iterations` steps."""

    name: ClassVar[str] = "centred-clipping"
    sum_only: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    order_independent: ClassVar[bool] = False

    radius: float = 0.0  # τ, l2 norm; 0: the median distance to v
    iterations: int = 3  # L, 1 or more

    def __post_init__(self) -> None:
        require_number("radius", self.radius, "a finite number of 0 or above", lambda x: x >= 0)
        require_integer("iterations", self.iterations, 1)

    def init(
        self, spec: ParamSpec, *, current: Tensors = NOTHING, memory: Tensors = NOTHING
    ) -> Gathered:
        """No rows. Raises: MergeError if the memory is not that of such tensors."""
        last_centre(spec, memory)
        return nothing_gathered(spec, memory)

    def add(self, state: Gathered, update: Tensors, weight: float, *, client: str = "") -> Gathered:
        """One update more; `weight` is checked and does not count."""
        return gathered(state, update, weight, client)

    def finish(self, state: Gathered) -> Merged:
        """v after the steps, as the change and, unrounded, as the memory."""
        require_some(self.name, len(state))
        centre = last_centre(state.spec, state.memory)
        for _ in range(self.iterations):
            radius = self.radius or float(np.median([_distance(row, centre) for row in state.rows]))
            moves = np.zeros(state.spec.size)
            for row in state.rows:
                move = row - centre
                norm = math.sqrt(squared_norm(move))
                moves += move if norm <= radius else move * (radius / norm)
            centre = centre + moves / len(state)
        return Merged(delta=shaped(state.spec, centre), memory=kept_centre(state.spec, centre))


def _distance(row: np.ndarray, centre: np.ndarray) -> float:
    return math.sqrt(squared_norm(row - centre))
