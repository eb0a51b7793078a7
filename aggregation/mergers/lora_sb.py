# SPDX-License-Identifier: Apache-2.0
"""LoRA-SB: a small trained core between two frozen factors.

*Source* Ponkshe et al., "Initialization using Update Approximation is a Silver Bullet for Extremely
Efficient Low-Rank Fine-Tuning" (arXiv 2411.19557), and for many clients Singhal et al., "Fed-SB: A
Silver Bullet for Extreme Communication Efficiency and Performance in (Private) Federated LoRA
Fine-Tuning" (arXiv 2502.15436): W = W0 + s·B·R·A, of which clients train R [r, r] alone. B and A
are the same for all, so s·B·(Σ p_i R_i)·A is the mean of the clients' products: r² values a layer
travel, whatever the number of clients. How B and A are found is the method's, not the merger's.
*Cost* that of the weighted mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from aggregation.errors import MergeError
from aggregation.mergers.factors import (
    MEAN,
    mean_delta,
    require_distinct,
    require_positive,
    require_unchanged,
)
from aggregation.mergers.merger import Merged
from aggregation.mergers.weighted_mean import MeanState
from protocol.tensors import NOTHING, ParamSpec, Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreTriple:
    """The three tensors of one layer by name. `down` and `up` are frozen, and need not be in the
    spec; where they are, updates must not change them."""

    core: str  # R [r, r]
    down: str  # A [r, k]
    up: str  # B [d, r]
    scale: float = 1.0  # s, above 0

    def __post_init__(self) -> None:
        require_distinct((self.core, self.down, self.up))
        require_positive(f'scale of "{self.core}"', self.scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRASB:
    """The weighted mean of every tensor but the frozen factors."""

    name: ClassVar[str] = "lora-sb"
    sum_only: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    order_independent: ClassVar[bool] = False
    mixed_ranks: ClassVar[bool] = False

    triples: tuple[CoreTriple, ...]

    def __post_init__(self) -> None:
        if not self.triples:
            raise MergeError("triples: expected one layer or more, found none")
        require_distinct(name for t in self.triples for name in (t.core, t.down, t.up))

    def frozen(self) -> tuple[str, ...]:
        """The tensors that clients must leave as they are."""
        return tuple(name for triple in self.triples for name in (triple.down, triple.up))

    def init(
        self, spec: ParamSpec, *, current: Tensors = NOTHING, memory: Tensors = NOTHING
    ) -> MeanState:
        """Zero sums; `current` is not needed."""
        for triple in self.triples:
            if triple.core not in spec:
                raise MergeError(f'triple: tensor "{triple.core}" is not in the spec')
            shape = spec[triple.core].shape
            if len(shape) != 2 or shape[0] != shape[1]:
                raise MergeError(
                    f'tensor "{triple.core}": expected a core [r, r], found {list(shape)}'
                )
            for name, axis in ((triple.down, 0), (triple.up, 1)):
                if name not in spec:
                    continue
                factor = spec[name].shape
                if len(factor) != 2 or factor[axis] != shape[0]:
                    raise MergeError(
                        f'tensor "{name}": expected a factor of rank {shape[0]}, '
                        f"found {list(factor)}"
                    )
        return MEAN.init(spec)

    def add(
        self, state: MeanState, update: Tensors, weight: float, *, client: str = ""
    ) -> MeanState:
        """One update more, zero for frozen factors; `weight` is finite and above 0."""
        added = MEAN.add(state, update, weight)
        frozen = [name for name in self.frozen() if name in state.spec]
        require_unchanged(update, frozen, "LoRA-SB trains the core alone")
        return added

    def finish(self, state: MeanState) -> Merged:
        """The mean of the updates."""
        return Merged(delta=mean_delta(state))
