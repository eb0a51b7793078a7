# SPDX-License-Identifier: Apache-2.0
"""FedEx-LoRA: both factors averaged apart, and what that misses goes into the frozen weight.

*Source* "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation
Models" (arXiv 2410.09432): B̄, Ā, and the residual s·(Σ p_i B_i A_i - B̄ Ā), which every client adds
to W0, round upon round.
*Differs from source* The residual is written Σ p_i (B_i - B̄)(A_i - Ā), which is the same and has
fewer columns, and no large products that cancel. It travels as these factors, or dense where that
is smaller; there is none for layers on which all clients agree. Factors of smaller ranks count as
padded by zeros; the source has one rank. p_i follows the weights; the source's code averages
evenly.
*Cost* memory at most d·k values a layer; downlink r·(d + k) and the residual, at most d·k more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from aggregation.mergers.factors import (
    Factors,
    ProductState,
    ProductSum,
    add_products,
    base_change,
    dense_is_smaller,
    init_products,
    mean_delta,
    product_norm,
    require_pairs,
)
from aggregation.mergers.merger import Merged
from protocol.factors import FactorPair
from protocol.tensors import NOTHING, ParamSpec, Tensors

# Of the norms of B̄ and Ā: below this a residual is rounding errors of float64.
_NEGLIGIBLE: Final = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class FedExLoRA:
    """The mean of every tensor, and every pair's residual as a change of the base."""

    name: ClassVar[str] = "fedex-lora"
    sum_only: ClassVar[bool] = False
    exact: ClassVar[bool] = True
    order_independent: ClassVar[bool] = False
    mixed_ranks: ClassVar[bool] = True

    pairs: tuple[FactorPair, ...]

    def __post_init__(self) -> None:
        require_pairs(self.pairs)

    def init(
        self, spec: ParamSpec, *, current: Tensors = NOTHING, memory: Tensors = NOTHING
    ) -> ProductState:
        """Empty sums; `current` fits the spec."""
        return init_products(spec, self.pairs, current)

    def add(
        self, state: ProductState, update: Tensors, weight: float, *, client: str = ""
    ) -> ProductState:
        """One update more, of any ranks up to the spec's; `weight` is finite and above 0."""
        return add_products(self.pairs, state, update, weight, mixed_ranks=self.mixed_ranks)

    def finish(self, state: ProductState) -> Merged:
        """`delta` is the mean of the updates, `base` has the residuals that are not zero."""
        delta = mean_delta(state.mean)
        base = {}
        for pair, products in zip(self.pairs, state.products, strict=True):
            # As they are sent, rounded: equal clients then leave a residual of zero.
            up = state.current[pair.up] + delta[pair.up]
            down = state.current[pair.down] + delta[pair.down]
            residual = _residual(products, up, down, state.mean.weight)
            scale = float(np.linalg.norm(up)) * float(np.linalg.norm(down))
            if _norm(residual) > _NEGLIGIBLE * scale:
                base[pair.down] = base_change(pair, residual)
        return Merged(delta=delta, base=base)


def _residual(products: ProductSum, up: np.ndarray, down: np.ndarray, weight: float) -> Factors:
    """Σ p_i B_i A_i - B̄ Ā."""
    rank = len(down)
    if products.dense is not None or dense_is_smaller(products.shape, len(products.terms) * rank):
        return Factors(products.mean(weight).product() - up @ down, None)
    lefts, rights = [], []
    for factor, own_up, own_down in products.terms:
        own = own_up.shape[1]
        left, right = 0.0 - up, 0.0 - down
        left[:, :own] += own_up
        right[:own] += own_down
        lefts.append(left)
        rights.append(factor / weight * right)
    return Factors(np.concatenate(lefts, axis=1), np.concatenate(rights))


def _norm(factors: Factors) -> float:
    if factors.right is None:
        return float(np.linalg.norm(factors.left))
    return product_norm(factors.left, factors.right)
