# SPDX-License-Identifier: Apache-2.0
"""The one update that lies closest to its neighbours.

An update's score is the sum of its squared distances to the n - f - 2 others nearest to it; the
lowest score is taken whole, of equal ones that which was added first. All clients count alike: an
attacker chooses the number of samples that it claims, so weights are checked and not used.

*Source* Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent",
NeurIPS 2017 (arXiv 1703.02757). Needs n > 2f + 2.
*Differs from source* in nothing; of the variants about, byzfl takes n - f - 1 neighbours.
*Cost* n² products of `size` values; memory n² values, and one float32 row an update, on disk beyond
a budget. One client's update is all that is learnt from a round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from aggregation.errors import MergeError
from aggregation.gathered import Gathered, gathered, nothing_gathered, require_some
from aggregation.mergers.merger import Merged
from aggregation.robust.distances import squared_distances
from aggregation.settings import require_integer
from aggregation.vectors import shaped
from protocol.tensors import NOTHING, ParamSpec, Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Krum:
    """Withstands f of n > 2f + 2 clients."""

    name: ClassVar[str] = "krum"
    sum_only: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    order_independent: ClassVar[bool] = False  # of equal scores the first is taken

    byzantine: int = 1  # f, the most clients that may lie

    def __post_init__(self) -> None:
        require_integer("byzantine", self.byzantine, 0)

    def init(
        self, spec: ParamSpec, *, current: Tensors = NOTHING, memory: Tensors = NOTHING
    ) -> Gathered:
        """No rows."""
        return nothing_gathered(spec, memory)

    def add(self, state: Gathered, update: Tensors, weight: float, *, client: str = "") -> Gathered:
        """One update more; `weight` is checked and does not count."""
        return gathered(state, update, weight, client)

    def finish(self, state: Gathered) -> Merged:
        """The chosen update, bit for bit where the spec is float32. Raises: MergeError where f is
        too many for the updates that came."""
        scores = checked_scores(self.name, state, self.byzantine)
        return Merged(delta=shaped(state.spec, state.rows.row(int(np.argmin(scores)))))


def checked_scores(rule: str, state: Gathered, byzantine: int) -> np.ndarray:
    """Krum's score of each update, float64 [n]. Raises: MergeError unless n > 2f + 2."""
    require_some(rule, len(state))
    require_enough(rule, len(state), byzantine, 2 * byzantine + 3)
    return krum_scores(squared_distances(state.rows), len(state) - byzantine - 2)


def require_enough(rule: str, count: int, byzantine: int, least: int) -> None:
    """Raises: MergeError where `count` updates are fewer than f clients that may lie ask for."""
    if count < least:
        raise MergeError(
            f"{rule}: with byzantine f = {byzantine}, expected at least n = {least} updates, found "
            f"n = {count}; lower f, or ask more clients"
        )


def krum_scores(distances: np.ndarray, neighbours: int) -> np.ndarray:
    """Σ of each row's smallest distances to others, [n], from squared distances [n, n]."""
    others = distances.copy()
    np.fill_diagonal(others, np.inf)
    return np.partition(others, neighbours - 1, axis=1)[:, :neighbours].sum(axis=1)
