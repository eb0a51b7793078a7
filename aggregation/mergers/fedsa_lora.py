# SPDX-License-Identifier: Apache-2.0
"""FedSA-LoRA: A is shared, B stays with the client.

*Source* Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning",
ICLR 2025 (arXiv 2410.01463): the server averages A alone; every client goes on with its own B, and
with its own classifier where `local` names it. There is no one model that results: a client's is
W0 + s·B_i·Ā, and is to be evaluated as such.
*Cost* that of the weighted mean, of the shared tensors alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from aggregation.errors import MergeError
from aggregation.mergers.factors import (
    MEAN,
    mean_delta,
    require_distinct,
    require_factors,
    require_pairs,
)
from aggregation.mergers.merger import Merged
from aggregation.mergers.weighted_mean import MeanState
from aggregation.vectors import require_floats
from protocol.factors import FactorPair
from protocol.tensors import NOTHING, ParamSpec, Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedState:
    """What has been added."""

    spec: ParamSpec
    mean: MeanState  # of the shared tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class FedSALoRA:
    """The weighted mean of every tensor but the B and those in `local`, whose change is zero.

    Updates have all tensors of the spec; the values of those that stay with the client are not
    read, so a client may send zeros for them.
    """

    name: ClassVar[str] = "fedsa-lora"
    sum_only: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    order_independent: ClassVar[bool] = False
    mixed_ranks: ClassVar[bool] = False

    pairs: tuple[FactorPair, ...]
    local: tuple[str, ...] = ()  # names of more tensors that stay with the client

    def __post_init__(self) -> None:
        require_pairs(self.pairs)
        require_distinct((*(n for p in self.pairs for n in (p.down, p.up)), *self.local))

    def kept(self) -> tuple[str, ...]:
        """The tensors that stay with the client."""
        return (*(pair.up for pair in self.pairs), *self.local)

    def init(
        self, spec: ParamSpec, *, current: Tensors = NOTHING, memory: Tensors = NOTHING
    ) -> SharedState:
        """Zero sums; `current` is not needed."""
        require_floats(spec)
        require_factors(spec, self.pairs)
        for name in self.local:
            if name not in spec:
                raise MergeError(f'local: tensor "{name}" is not in the spec')
        kept = set(self.kept())
        shared = ParamSpec(tuple(entry for entry in spec.entries if entry[0] not in kept))
        return SharedState(spec=spec, mean=MEAN.init(shared))

    def add(
        self, state: SharedState, update: Tensors, weight: float, *, client: str = ""
    ) -> SharedState:
        """One update more; `weight` is finite and above 0."""
        if problem := state.spec.mismatch(update):
            raise MergeError(f"cannot merge: {problem}")
        shared = {name: update[name] for name in state.mean.spec.names}
        return SharedState(spec=state.spec, mean=MEAN.add(state.mean, shared, weight))

    def finish(self, state: SharedState) -> Merged:
        """The mean of the shared tensors' updates, zero for the others."""
        delta = mean_delta(state.mean)
        for name in self.kept():
            delta[name] = np.zeros(state.spec[name].shape, state.spec[name].dtype)
        return Merged(delta=delta)
