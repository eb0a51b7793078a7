# SPDX-License-Identifier: Apache-2.0
"""FedIT: both LoRA factors averaged, each by itself.

*Source* Zhang et al. 2023, "Towards Building the Federated GPT: Federated Instruction Tuning"
(arXiv 2305.05644): B̄ = Σ p_i B_i, Ā = Σ p_i A_i.
*Cost* that of the weighted mean, which this is, and of which nothing here differs but what may be
said of the result: B̄ Ā is not the mean of the clients' products. It falls short of that by
s·Σ p_i (B_i - B̄)(A_i - Ā), of rank at most (clients - 1)·r, zero where clients agree on a factor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from aggregation.mergers.factors import (
    MEAN,
    mean_delta,
    require_factors,
    require_pairs,
)
from aggregation.mergers.merger import Merged
from aggregation.mergers.weighted_mean import MeanState
from protocol.factors import FactorPair
from protocol.tensors import NOTHING, ParamSpec, Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class FedIT:
    """The weighted mean of every tensor."""

    name: ClassVar[str] = "fedit"
    sum_only: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    order_independent: ClassVar[bool] = False
    mixed_ranks: ClassVar[bool] = False

    pairs: tuple[FactorPair, ...]

    def __post_init__(self) -> None:
        require_pairs(self.pairs)

    def init(
        self, spec: ParamSpec, *, current: Tensors = NOTHING, memory: Tensors = NOTHING
    ) -> MeanState:
        """Zero sums; `current` is not needed."""
        require_factors(spec, self.pairs)
        return MEAN.init(spec)

    def add(
        self, state: MeanState, update: Tensors, weight: float, *, client: str = ""
    ) -> MeanState:
        """One update more; `weight` is finite and above 0."""
        return MEAN.add(state, update, weight)

    def finish(self, state: MeanState) -> Merged:
        """The mean of the updates."""
        return Merged(delta=mean_delta(state))
