# SPDX-License-Identifier: Apache-2.0
"""HetLoRA: factors of any rank, padded by zeros and averaged by the size of their products.

*Source* Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models",
EMNLP 2024 (arXiv 2401.06432): client i weighs ‖B_i A_i‖_F / Σ ‖B_j A_j‖_F, and A and B are averaged
apart; a client of rank q is sent the first q rows and columns of the result (known at second hand).
*Differs from source* Weights are a pair's own, and `weight` counts only for tensors in no pair and
for pairs whose products are all zero, which a note names. Pruning of a client's own rank is the
client's: it sends what it has left.
A client sets its weight by the size of its update: limit the norm of updates before they are added.
*Cost* memory a float64 copy of all tensors and two more of the factors; norms by Gram matrices,
O((d + k) r²) an update.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from aggregation.mergers.factors import (
    MEAN,
    client_factors,
    current_factors,
    mean_delta,
    padded,
    product_norm,
    require_pairs,
    rounded,
)
from aggregation.mergers.merger import Merged
from aggregation.mergers.weighted_mean import MeanState
from protocol.factors import FactorPair
from protocol.tensors import NOTHING, ParamSpec, Tensors


class NormSums(NamedTuple):
    """One pair's sums, weighted by n = ‖B_i A_i‖_F."""

    up: np.ndarray  # float64 [d, r], Σ n · change of B
    down: np.ndarray  # float64 [r, k], Σ n · change of A
    norm: float  # Σ n


@dataclass(frozen=True, slots=True, kw_only=True)
class NormState:
    """What has been added."""

    mean: MeanState  # by `weight`, of updates padded to the spec's ranks
    current: Mapping[str, np.ndarray]  # the pairs' tensors, float64
    sums: tuple[NormSums, ...]  # one a pair


@dataclass(frozen=True, slots=True, kw_only=True)
class HetLoRA:
    """The mean of both factors, weighted by the norms of their products."""

    name: ClassVar[str] = "hetlora"
    sum_only: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    order_independent: ClassVar[bool] = False
    mixed_ranks: ClassVar[bool] = True

    pairs: tuple[FactorPair, ...]

    def __post_init__(self) -> None:
        require_pairs(self.pairs)

    def init(
        self, spec: ParamSpec, *, current: Tensors = NOTHING, memory: Tensors = NOTHING
    ) -> NormState:
        """Zero sums; `current` fits the spec."""
        mean = MEAN.init(spec)
        factors = current_factors(spec, self.pairs, current)
        sums = tuple(
            NormSums(np.zeros(spec[pair.up].shape), np.zeros(spec[pair.down].shape), 0.0)
            for pair in self.pairs
        )
        return NormState(mean=mean, current=factors, sums=sums)

    def add(
        self, state: NormState, update: Tensors, weight: float, *, client: str = ""
    ) -> NormState:
        """One update more, of any ranks up to the spec's; `weight` is finite and above 0."""
        whole = padded(state.mean.spec, self.pairs, state.current, update)
        mean = MEAN.add(state.mean, whole, weight)
        sums = []
        for pair, before in zip(self.pairs, state.sums, strict=True):
            norm = product_norm(*client_factors(pair, state.current, update))
            # A float times a float32 array would be rounded to float32, or beyond it.
            up, down = (norm * whole[name].astype(np.float64) for name in (pair.up, pair.down))
            sums.append(NormSums(before.up + up, before.down + down, before.norm + norm))
        return NormState(mean=mean, current=state.current, sums=tuple(sums))

    def finish(self, state: NormState) -> Merged:
        """The weighted means; for pairs without any product those by `weight`."""
        delta = mean_delta(state.mean)
        notes = []
        for pair, sums in zip(self.pairs, state.sums, strict=True):
            if sums.norm == 0:
                notes.append(f'"{pair.down}": every product is zero; averaged by weight')
                continue
            for name, total in ((pair.up, sums.up), (pair.down, sums.down)):
                delta[name] = rounded(name, total / sums.norm, state.mean.spec[name].dtype)
        return Merged(delta=delta, notes=tuple(notes))
