# SPDX-License-Identifier: Apache-2.0
"""FFA-LoRA: A stays as it was drawn, B is trained and averaged.

*Source* Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024
(arXiv 2403.12313). With one A for all, s·Σ p_i B_i A = s·B̄·A: the mean is exact, half as much
travels, and noise added to B is not multiplied by noise added to A.
*Cost* that of the weighted mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from aggregation.mergers.factors import (
    MEAN,
    mean_delta,
    require_factors,
    require_pairs,
    require_unchanged,
)
from aggregation.mergers.merger import Merged
from aggregation.mergers.weighted_mean import MeanState
from protocol.factors import FactorPair
from protocol.tensors import NOTHING, ParamSpec, Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class FFALoRA:
    """The weighted mean of every tensor but the A, which no client may change."""

    name: ClassVar[str] = "ffa-lora"
    sum_only: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    order_independent: ClassVar[bool] = False
    mixed_ranks: ClassVar[bool] = False

    pairs: tuple[FactorPair, ...]

    def __post_init__(self) -> None:
        require_pairs(self.pairs)

    def frozen(self) -> tuple[str, ...]:
        """The tensors that clients must leave as they are."""
        return tuple(pair.down for pair in self.pairs)

    def init(
        self, spec: ParamSpec, *, current: Tensors = NOTHING, memory: Tensors = NOTHING
    ) -> MeanState:
        """Zero sums; `current` is not needed."""
        require_factors(spec, self.pairs)
        return MEAN.init(spec)

    def add(
        self, state: MeanState, update: Tensors, weight: float, *, client: str = ""
    ) -> MeanState:
        """One update more, whose changes of every A are zero; `weight` is finite and above 0."""
        added = MEAN.add(state, update, weight)
        require_unchanged(update, self.frozen(), "FFA-LoRA trains B alone")
        return added

    def finish(self, state: MeanState) -> Merged:
        """The mean of the updates, zero for every A."""
        return Merged(delta=mean_delta(state))
