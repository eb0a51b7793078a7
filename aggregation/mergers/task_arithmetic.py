# SPDX-License-Identifier: Apache-2.0
"""λ times the sum of the updates.

*Source* Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023 (arXiv 2212.04089): λΣτᵢ.
*Differs from source* the source has no weights; here the sum is n·Σ wᵢτᵢ / Σ wᵢ, which for equal
weights is Στᵢ, so that a job's weighting keeps its meaning.

λ = 1/n is the mean. The default is for a few tasks that pull different ways: n clients of one task
pull the same way, and are carried λn times as far as their mean.
*Cost* that of `WeightedMean`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from aggregation.gathered import require_some
from aggregation.mergers.merger import Merged
from aggregation.mergers.weighted_mean import MeanState, WeightedMean
from aggregation.settings import require_number
from aggregation.vectors import shaped
from protocol.tensors import NOTHING, ParamSpec, Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskArithmetic:
    """Streaming scaled sum."""

    name: ClassVar[str] = "task-arithmetic"
    sum_only: ClassVar[bool] = True  # Σ wτ, Σ w and the number of updates
    exact: ClassVar[bool] = False
    order_independent: ClassVar[bool] = False

    scaling: float = 0.4  # λ, above 0

    def __post_init__(self) -> None:
        require_number("scaling", self.scaling, "a finite number above 0", lambda x: x > 0)

    def init(
        self, spec: ParamSpec, *, current: Tensors = NOTHING, memory: Tensors = NOTHING
    ) -> MeanState:
        """Zero sums."""
        return WeightedMean().init(spec)

    def add(
        self, state: MeanState, update: Tensors, weight: float, *, client: str = ""
    ) -> MeanState:
        """One update more."""
        return WeightedMean().add(state, update, weight)

    def finish(self, state: MeanState) -> Merged:
        """The scaled sum. Raises: MergeError where it is beyond the tensors' types."""
        require_some(self.name, state.count)
        mean = state.mean()
        return Merged(delta=shaped(state.spec, mean * (self.scaling * state.count)))
