# SPDX-License-Identifier: Apache-2.0
"""Krum chooses updates one after another; then a mean near the median, value by value.

θ = n - 2f updates are chosen, each by Krum among those not chosen yet; for each value the θ - 2f of
them closest to their median are averaged, of two equally close the lower first. All clients count
alike: an attacker chooses the number of samples that it claims, so weights are checked and not
used.

*Source* El Mhamdi, Guerraoui, Rouault, "The Hidden Vulnerability of Distributed Learning in
Byzantium", ICML 2018 (arXiv 1802.07927). Needs n ≥ 4f + 3.
*Differs from source* with m updates left Krum sums the m - f - 2 nearest, and 1 where that would be
fewer (the last choices, where the source says nothing); as Flower's `aggregate_bulyan` has it.
*Cost* n² products of `size` values, then θ choices of n² steps; memory n² values, and one float32
row an update, on disk beyond a budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from aggregation.gathered import Gathered, gathered, nothing_gathered, require_some
from aggregation.mergers.merger import Merged
from aggregation.robust.coordinate_median import sorted_median
from aggregation.robust.distances import squared_distances
from aggregation.robust.krum import krum_scores, require_enough
from aggregation.settings import require_integer
from aggregation.vectors import shaped
from protocol.tensors import NOTHING, ParamSpec, Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Bulyan:
    """Withstands f of n ≥ 4f + 3 clients, in every single value."""

    name: ClassVar[str] = "bulyan"
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
        """The mean near the median. Raises: MergeError where f is too many for the updates that
        came."""
        require_some(self.name, len(state))
        require_enough(self.name, len(state), self.byzantine, 4 * self.byzantine + 3)
        chosen = _chosen(squared_distances(state.rows), self.byzantine)
        kept = len(chosen) - 2 * self.byzantine
        mean = np.empty(state.spec.size)
        for columns, block in state.rows.column_blocks():
            mean[columns] = _near_median(np.sort(block[chosen], axis=0), kept)
        return Merged(delta=shaped(state.spec, mean))


def _chosen(distances: np.ndarray, byzantine: int) -> np.ndarray:
    """θ = n - 2f row numbers, ascending."""
    left = np.arange(len(distances))
    for _ in range(len(distances) - 2 * byzantine):
        scores = krum_scores(distances[np.ix_(left, left)], max(1, len(left) - byzantine - 2))
        left = np.delete(left, int(np.argmin(scores)))
    return np.setdiff1d(np.arange(len(distances)), left)


def _near_median(ordered: np.ndarray, kept: int) -> np.ndarray:
    """The mean of the `kept` values closest to the median, of sorted columns [θ, columns]."""
    gaps = np.abs(ordered - sorted_median(ordered))
    nearest = np.argsort(gaps, axis=0, kind="stable")[:kept]
    return np.take_along_axis(ordered, nearest, axis=0).sum(axis=0, dtype=np.float64) / kept
