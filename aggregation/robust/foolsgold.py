# SPDX-License-Identifier: Apache-2.0
"""The mean of the updates, those that have long pointed the same way as another counting less.

Clients that work together (sybils) push in one direction round after round, where honest ones, with
data of their own, do not. Each client's updates are summed over the rounds; of these sums all
cosines are taken, and from a client's largest cosine follows its weight, from 1 (unlike all others)
to 0 (the twin of another). Sample counts are checked and not used: an attacker chooses its own.

*Source* Fung, Yoon, Beschastnikh, "Mitigating Sybils in Federated Learning Poisoning", 2018
(arXiv 1808.04866), and its authors' code (DistributedML/FoolsGold); without the choice of
indicative features.
*Differs from source* the result is divided by Σ weights, so that its size does not depend on how
many were trusted. A history of zeros has cosine 0 with all others. A weight that rounding alone
keeps from 0 is 0; where all are (every client has a twin) none stands out and all count alike,
where the source divides by zero. Only clients of this round are compared.
*Cost* n² products of `size` values; memory n² values, and two float32 rows an update, on disk
beyond a budget. `memory` holds the sum of every client that ever took part, float32, as
"history/CLIENT": `size` values each.

It needs to know clients over rounds, and punishes honest ones whose data are alike: not for data
spread evenly. A single attacker is unlike all others, and is not held back at all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Final

import numpy as np

from aggregation.errors import MergeError
from aggregation.gathered import (
    Gathered,
    checked_row,
    nothing_gathered,
    require_some,
    with_row,
)
from aggregation.mergers.merger import Merged
from aggregation.robust.distances import inner_products
from aggregation.stack import Stack
from aggregation.vectors import checked_weight, shaped
from protocol.tensors import NOTHING, ParamSpec, Tensors

_PREFIX: Final = "history/"
_ROUNDING: Final = 1e-12  # of 1 - cosine, for sums kept in float32
_LARGEST: Final = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True, kw_only=True)
class FoolsGoldState:
    """What has been added, and what the same clients sent until now."""

    round: Gathered
    histories: Stack  # float32 [n_clients, size]: sums over all rounds, this one included


@dataclass(frozen=True, slots=True, kw_only=True)
class FoolsGold:
    """Withstands any number of clients that push one way, if honest ones differ."""

    name: ClassVar[str] = "foolsgold"
    sum_only: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    order_independent: ClassVar[bool] = False

    def init(
        self, spec: ParamSpec, *, current: Tensors = NOTHING, memory: Tensors = NOTHING
    ) -> FoolsGoldState:
        """No rows. Raises: MergeError if the memory is not that of such tensors."""
        for name, history in memory.items():
            if not name.startswith(_PREFIX):
                continue
            if history.shape != (spec.size,) or not np.isfinite(history).all():
                raise MergeError(
                    f'memory "{name}": expected {spec.size} finite values, '
                    f"found {history.dtype} {list(history.shape)}"
                )
        return FoolsGoldState(round=nothing_gathered(spec, memory), histories=Stack(spec.size))

    def add(
        self, state: FoolsGoldState, update: Tensors, weight: float, *, client: str = ""
    ) -> FoolsGoldState:
        """One update more; `weight` is checked and does not count.

        Raises: MergeError without the client's name, or when the client has an update already.
        """
        if not client:
            raise MergeError(f"{self.name}: expected the client's name, found none")
        if client in state.round.clients:
            raise MergeError(f"{self.name}: expected one update of client {client!r}, found two")
        factor = checked_weight(weight)
        vector = checked_row(state.round.spec, update)
        history = vector + state.round.memory.get(_PREFIX + client, 0.0)
        if history.size and float(np.abs(history).max()) > _LARGEST:
            raise MergeError(
                f"client {client!r}: expected updates whose sum over the rounds is within float32"
            )
        return replace(
            state,
            round=with_row(state.round, vector, factor, client),
            histories=state.histories.with_row(history),
        )

    def finish(self, state: FoolsGoldState) -> Merged:
        """The mean in the weights that the histories give."""
        require_some(self.name, len(state.round))
        weights = foolsgold_weights(_cosines(inner_products(state.histories)))
        sums = np.zeros(state.round.spec.size)
        for weight, row in zip(weights, state.round.rows, strict=True):
            sums += weight * row.astype(np.float64)
        memory = dict(state.round.memory)
        for client, history in zip(state.round.clients, state.histories, strict=True):
            memory[_PREFIX + client] = history.copy()
        return Merged(delta=shaped(state.round.spec, sums / weights.sum()), memory=memory)


def foolsgold_weights(cosines: np.ndarray) -> np.ndarray:
    """Weights from 0 to 1, [n], the largest 1, from cosines [n, n] with 0 on the diagonal."""
    largest = cosines.max(axis=1)  # 0 or above, since the diagonal is 0
    pardoned = cosines.copy()
    for i, own in enumerate(largest):
        # an honest client that looks a little like a sybil is less like one than sybils are
        above = largest > own
        pardoned[i, above] *= own / largest[above]
    weights = np.clip(1 - pardoned.max(axis=1), 0, 1)
    weights[weights <= _ROUNDING] = 0
    if not weights.any():
        return np.ones(len(weights))
    weights /= weights.max()
    weights[weights == 1] = 0.99
    trusted = weights > 0  # ln 0 is -∞, and clips to 0
    odds = weights[trusted] / (1 - weights[trusted])
    weights[trusted] = np.clip(np.log(odds) + 0.5, 0, 1)
    return weights


def _cosines(products: np.ndarray) -> np.ndarray:
    """[n, n] with 0 on the diagonal, and for rows of zeros."""
    norms = np.sqrt(np.diag(products))
    scale = norms[:, None] * norms[None, :]
    cosines = np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)
    np.fill_diagonal(cosines, 0)
    return np.minimum(cosines, 1)
