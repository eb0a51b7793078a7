# SPDX-License-Identifier: Apache-2.0
"""The mean of the m updates that lie closest to their neighbours, by Krum's scores.

All clients count alike, in the choice and in the mean: an attacker chooses the number of samples
that it claims, so weights are checked and not used.

*Source* Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent",
NeurIPS 2017 (arXiv 1703.02757). Needs n > 2f + 2.
*Differs from source* m is n - f unless it is given, and never more: beyond that, an attacker is
sure to be in the mean. There is one round of scores, not one a choice.
*Cost* n² products of `size` values; memory n² values, and one float32 row an update, on disk beyond
a budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from aggregation.errors import MergeError
from aggregation.gathered import Gathered, gathered, nothing_gathered
from aggregation.mergers.merger import Merged
from aggregation.robust.krum import checked_scores
from aggregation.settings import require_integer
from aggregation.vectors import shaped
from protocol.tensors import NOTHING, ParamSpec, Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiKrum:
    """Withstands f of n > 2f + 2 clients."""

    name: ClassVar[str] = "multi-krum"
    sum_only: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    order_independent: ClassVar[bool] = False

    byzantine: int = 1  # f, the most clients that may lie
    chosen: int = 0  # m, updates in the mean, at most n - f; 0: n - f

    def __post_init__(self) -> None:
        require_integer("byzantine", self.byzantine, 0)
        require_integer("chosen", self.chosen, 0)

    def init(
        self, spec: ParamSpec, *, current: Tensors = NOTHING, memory: Tensors = NOTHING
    ) -> Gathered:
        """No rows."""
        return nothing_gathered(spec, memory)

    def add(self, state: Gathered, update: Tensors, weight: float, *, client: str = "") -> Gathered:
        """One update more; `weight` is checked and does not count."""
        return gathered(state, update, weight, client)

    def finish(self, state: Gathered) -> Merged:
        """The mean of the chosen. Raises: MergeError where f or m is too many for the updates that
        came."""
        scores = checked_scores(self.name, state, self.byzantine)
        most = len(state) - self.byzantine
        if self.chosen > most:
            raise MergeError(
                f"{self.name}: with n = {len(state)} updates and byzantine f = {self.byzantine}, "
                f"expected at most m = n - f = {most} chosen, found {self.chosen}"
            )
        count = self.chosen or most
        sums = np.zeros(state.spec.size)
        for number in np.sort(np.argsort(scores, kind="stable")[:count]):
            sums += state.rows.row(int(number))
        return Merged(delta=shaped(state.spec, sums / count))
