# SPDX-License-Identifier: Apache-2.0
"""FlexLoRA: the best factors of the spec's rank for the mean of the clients' products.

*Source* Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and
Client Resources" (arXiv 2402.11505): ΔW = Σ p_i s_i B_i A_i = U S Vᵀ; rank r gets B = U_r S_r / s
and A = V_rᵀ. A client of a smaller rank takes the leading columns and rows, which are the best of
its rank.
*Differs from source* ΔW is not formed while the stacked factors are smaller: a QR of both stacks
and an SVD of the small core give the same result. One scale s serves all ranks (the source's code
has 16 / r_i). Directions with a singular value of zero have B = 0 and keep the current A, so that
they can still be trained. `balanced` gives U √S and √S Vᵀ instead.
*Cost* memory at most d·k values a layer; finish O((d + k) q²) for q = Σ r_i stacked columns, or an
SVD of [d, k] once the stack is dense.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from aggregation.mergers.factors import (
    ProductState,
    add_products,
    init_products,
    mean_delta,
    require_pairs,
    rounded,
    truncated,
)
from aggregation.mergers.merger import Merged
from protocol.factors import FactorPair
from protocol.tensors import NOTHING, ParamSpec, Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class FlexLoRA:
    """Truncated SVD of every pair's mean product.

    Exact where the clients' products together have no more than the spec's rank; a note says what
    was lost otherwise, of the mean product's Frobenius norm.
    """

    name: ClassVar[str] = "flexlora"
    sum_only: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    order_independent: ClassVar[bool] = False
    mixed_ranks: ClassVar[bool] = True

    pairs: tuple[FactorPair, ...]
    balanced: bool = False  # singular values shared by both factors, not all in B

    def __post_init__(self) -> None:
        require_pairs(self.pairs)

    def init(
        self, spec: ParamSpec, *, current: Tensors = NOTHING, memory: Tensors = NOTHING
    ) -> ProductState:
        """Empty stacks; `current` fits the spec."""
        return init_products(spec, self.pairs, current)

    def add(
        self, state: ProductState, update: Tensors, weight: float, *, client: str = ""
    ) -> ProductState:
        """One update more, of any ranks up to the spec's; `weight` is finite and above 0."""
        return add_products(self.pairs, state, update, weight, mixed_ranks=self.mixed_ranks)

    def finish(self, state: ProductState) -> Merged:
        """The change to the best factors; the note names the pair that lost most."""
        delta = mean_delta(state.mean)
        spec = state.mean.spec
        errors = {}
        for pair, products in zip(self.pairs, state.products, strict=True):
            rank = spec[pair.down].shape[0]
            left, right = products.mean(state.mean.weight)
            # The scale is the same before and after, and cancels.
            best = truncated(left, right, rank, balanced=self.balanced)
            best.down[best.kept :] = state.current[pair.down][best.kept :]
            for name, factor in ((pair.up, best.up), (pair.down, best.down)):
                delta[name] = rounded(name, factor - state.current[name], spec[name].dtype)
            errors[pair.down] = best.error
        worst = max(errors, key=lambda name: errors[name])
        note = (
            f"truncated to the spec's rank: relative error at most {errors[worst]:.6g} "
            f'("{worst}"), mean {sum(errors.values()) / len(errors):.6g}'
        )
        return Merged(delta=delta, notes=(note,))
