# SPDX-License-Identifier: Apache-2.0
"""The plain mean of the updates, all counting alike.

*Source* Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves
accuracy without increasing inference time", ICML 2022 (arXiv 2203.05482), the uniform soup.

Weights are checked and not used, so that sums of weighted updates do not give it: under a mask take
`WeightedMean` with weights that are all equal, which is the same mean.
*Cost* that of `WeightedMean`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from aggregation.gathered import require_some
from aggregation.mergers.merger import Merged
from aggregation.mergers.weighted_mean import MeanState, WeightedMean
from aggregation.vectors import checked_weight
from protocol.tensors import NOTHING, ParamSpec, Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class UniformSoup:
    """Streaming plain mean."""

    name: ClassVar[str] = "uniform-soup"
    sum_only: ClassVar[bool] = False
    exact: ClassVar[bool] = False  # only where all weights are equal
    order_independent: ClassVar[bool] = False

    def init(
        self, spec: ParamSpec, *, current: Tensors = NOTHING, memory: Tensors = NOTHING
    ) -> MeanState:
        """Zero sums."""
        return WeightedMean().init(spec)

    def add(
        self, state: MeanState, update: Tensors, weight: float, *, client: str = ""
    ) -> MeanState:
        """One update more; `weight` is checked and does not count."""
        checked_weight(weight)
        return WeightedMean().add(state, update, 1.0)

    def finish(self, state: MeanState) -> Merged:
        """The mean."""
        require_some(self.name, state.count)
        return WeightedMean().finish(state)
