# SPDX-License-Identifier: Apache-2.0
"""FLoRA: the clients' factors are stacked, and their product goes into the frozen weight.

*Source* Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous
Low-Rank Adaptations" (arXiv 2409.05976): [B_1, …]·[p_1 A_1; …] = Σ p_i B_i A_i, whatever the ranks;
the weights p_i stand on A alone. Every client merges the product into its weights and starts the
next round from new factors.
*Differs from source* The next round's factors are B = 0 and A as it was sent out for this round,
where the source draws a new A: so all devices know it without a seed more. A stack that has grown
larger than the weight itself travels as one dense matrix. One scale s serves all ranks, as in the
source's runs, where alpha is a multiple of the rank.
*Cost* memory and downlink at most d·k values a layer, else Σ r_i·(d + k); time d·k·r_i an update
once the stack is dense.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from aggregation.mergers.factors import (
    ProductState,
    add_products,
    base_change,
    init_products,
    mean_delta,
    require_pairs,
    rounded,
)
from aggregation.mergers.merger import Merged
from protocol.factors import FactorPair
from protocol.tensors import NOTHING, ParamSpec, Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class FLoRA:
    """Every pair's mean product as a change of the base; B is then zero."""

    name: ClassVar[str] = "flora"
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
        """Empty stacks; `current` fits the spec."""
        return init_products(spec, self.pairs, current)

    def add(
        self, state: ProductState, update: Tensors, weight: float, *, client: str = ""
    ) -> ProductState:
        """One update more, of any ranks up to the spec's; `weight` is finite and above 0."""
        return add_products(self.pairs, state, update, weight, mixed_ranks=self.mixed_ranks)

    def finish(self, state: ProductState) -> Merged:
        """`base` has the mean product of every pair, `delta` takes every B to zero."""
        delta = mean_delta(state.mean)
        base = {}
        for pair, products in zip(self.pairs, state.products, strict=True):
            base[pair.down] = base_change(pair, products.mean(state.mean.weight))
            delta[pair.down] = np.zeros_like(delta[pair.down])
            delta[pair.up] = rounded(
                pair.up, 0.0 - state.current[pair.up], state.mean.spec[pair.up].dtype
            )
        return Merged(delta=delta, base=base)
