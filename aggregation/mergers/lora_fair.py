# SPDX-License-Identifier: Apache-2.0
"""LoRA-FAIR, the variant in closed form: Ā as it is, and B̄ corrected towards the mean product.

*Source* Bian et al., "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization
Refinement" (arXiv 2411.14961): Ā and B̄ + ΔB are sent, with ΔB the minimiser of a discrepancy
between (B̄ + ΔB)·Ā and Σ p_i B_i A_i, and a penalty on ΔB (known at second hand: neither the paper's
formulas nor code of its authors were at hand).
*Differs from source* The paper is said to take a discrepancy of the cosine kind and gradient steps;
this is the Frobenius norm, whose minimiser is ΔB = (Σ p_i B_i A_i - B̄ Ā) Āᵀ (Ā Āᵀ + ridge·I)⁻¹.
Results are those of this variant, not of the paper. The scale s is left out of both terms, so that
`ridge` weighs the same whatever it is.
*Cost* memory at most d·k values a layer; finish O((d + k)·q·r) for q stacked columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from aggregation.mergers.factors import (
    ProductState,
    add_products,
    init_products,
    mean_delta,
    require_pairs,
    require_positive,
    rounded,
)
from aggregation.mergers.merger import Merged
from protocol.factors import FactorPair
from protocol.tensors import NOTHING, ParamSpec, Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRAFair:
    """The mean of every tensor, B corrected by what Ā can express of the residual."""

    name: ClassVar[str] = "lora-fair"
    sum_only: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    order_independent: ClassVar[bool] = False
    mixed_ranks: ClassVar[bool] = False

    pairs: tuple[FactorPair, ...]
    ridge: float = 0.01  # λ, above 0; the larger, the smaller the correction

    def __post_init__(self) -> None:
        require_pairs(self.pairs)
        require_positive("ridge", self.ridge)

    def init(
        self, spec: ParamSpec, *, current: Tensors = NOTHING, memory: Tensors = NOTHING
    ) -> ProductState:
        """Empty sums; `current` fits the spec."""
        return init_products(spec, self.pairs, current)

    def add(
        self, state: ProductState, update: Tensors, weight: float, *, client: str = ""
    ) -> ProductState:
        """One update more; `weight` is finite and above 0."""
        return add_products(self.pairs, state, update, weight, mixed_ranks=self.mixed_ranks)

    def finish(self, state: ProductState) -> Merged:
        """The mean of the updates, with the correction in every B."""
        delta = mean_delta(state.mean)
        for pair, products in zip(self.pairs, state.products, strict=True):
            up = state.current[pair.up] + delta[pair.up]
            down = state.current[pair.down] + delta[pair.down]
            # By Ā = U S Vᵀ, which spares the inverse of a product that may be all but singular.
            U, S, Vt = np.linalg.svd(down, full_matrices=False)
            missed = products.mean(state.mean.weight).times(Vt.T) - up @ (U * S)
            correction = missed * (S / (S**2 + self.ridge)) @ U.T
            dtype = state.mean.spec[pair.up].dtype
            delta[pair.up] = rounded(pair.up, up + correction - state.current[pair.up], dtype)
        return Merged(delta=delta)
