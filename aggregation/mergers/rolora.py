# SPDX-License-Identifier: Apache-2.0
"""RoLoRA: the rounds train B and A in turn.

*Source* Chen et al., "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA"
(arXiv 2502.01755): B in odd rounds with A frozen, A in even rounds with B frozen. One factor is the
same for all clients, so the mean of the other is exact, and half as much travels. B comes first
because it starts at zero, and A has no gradient beside a zero B.
*Cost* that of the weighted mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from aggregation.errors import MergeError
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

ROUND: Final = "round"  # in the memory: rounds finished so far, an int64 scalar


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnState:
    """What has been added."""

    mean: MeanState
    finished: int  # rounds before this one


@dataclass(frozen=True, slots=True, kw_only=True)
class RoLoRA:
    """The weighted mean of every tensor but the factors whose turn it is not.

    Turns are counted by rounds that were finished: a round that failed is repeated, not skipped.
    """

    name: ClassVar[str] = "rolora"
    sum_only: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    order_independent: ClassVar[bool] = False
    mixed_ranks: ClassVar[bool] = False

    pairs: tuple[FactorPair, ...]

    def __post_init__(self) -> None:
        require_pairs(self.pairs)

    def frozen(self, memory: Tensors = NOTHING) -> tuple[str, ...]:
        """The tensors that clients must leave as they are in the round that starts from `memory`.

        Raises: MergeError for a memory that no round left.
        """
        return self._frozen(_finished(memory))

    def init(
        self, spec: ParamSpec, *, current: Tensors = NOTHING, memory: Tensors = NOTHING
    ) -> TurnState:
        """Zero sums; `current` is not needed, an empty `memory` is the first round's."""
        require_factors(spec, self.pairs)
        return TurnState(mean=MEAN.init(spec), finished=_finished(memory))

    def add(
        self, state: TurnState, update: Tensors, weight: float, *, client: str = ""
    ) -> TurnState:
        """One update more, zero for the frozen tensors; `weight` is finite and above 0."""
        mean = MEAN.add(state.mean, update, weight)
        active = "A" if state.finished % 2 else "B"
        require_unchanged(
            update,
            self._frozen(state.finished),
            f"RoLoRA trains {active} alone in round {state.finished + 1}",
        )
        return TurnState(mean=mean, finished=state.finished)

    def finish(self, state: TurnState) -> Merged:
        """The mean of the updates; the memory counts one round more."""
        memory = {ROUND: np.array(state.finished + 1, np.int64)}
        return Merged(delta=mean_delta(state.mean), memory=memory)

    def _frozen(self, finished: int) -> tuple[str, ...]:
        return tuple(pair.up if finished % 2 else pair.down for pair in self.pairs)


def _finished(memory: Tensors) -> int:
    if not memory:
        return 0
    rounds = memory.get(ROUND)
    if rounds is None or rounds.shape != () or not (float(rounds).is_integer() and rounds >= 0):
        found = "none" if rounds is None else str(rounds)
        raise MergeError(f'memory: expected "{ROUND}", a whole number of rounds, found {found}')
    return int(rounds)
