# SPDX-License-Identifier: Apache-2.0
"""How far the server has moved frozen weights, and which part of that a client still has to hear.

A client keeps what it was told with its last plan, so that whoever took part in the round before is
sent the last change alone: a few columns and rows a layer. Everybody else is sent all of it, which
soon is as large as the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np

from aggregation.mergers import BaseChange
from aggregation.offsets import moved, pack_changes, whole
from protocol.factors import FactorPair


@dataclass(frozen=True, kw_only=True)
class Offsets:
    """By the pairs' `down` factors, as everywhere that offsets travel."""

    held: Mapping[str, np.ndarray]
    """How far weights had moved when the last plans went out: what those clients hold."""
    change: Mapping[str, BaseChange]
    """What was merged since."""

    @cached_property
    def total(self) -> dict[str, np.ndarray]:
        """How far weights have moved."""
        return moved(self.held, self.change)

    def after(self, change: Mapping[str, BaseChange]) -> Offsets:
        """Plans of this state have gone out, and `change` came of them."""
        return Offsets(held=self.total, change=change)

    def weights(self, pairs: Sequence[FactorPair]) -> dict[str, np.ndarray]:
        """`total` by the names of the frozen weights."""
        return {pair.base: self.total[pair.down] for pair in pairs if pair.down in self.total}

    def parcel(self, pairs: Sequence[FactorPair], held_round: int, holds: bool) -> OffsetParcel:
        """For a client that kept `held` in that round, or one that holds nothing."""
        # Before the first change nobody has anything to keep, and all hold the same.
        base_round = held_round if holds and self.held else 0
        changes = self.change if base_round or not self.held else whole(self.total)
        ranks, payload = pack_changes(changes, pairs)
        return OffsetParcel(base_round=base_round, ranks=ranks, payload=payload)


AT_REST: Final = Offsets(held={}, change={})
"""No weight has moved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OffsetParcel:
    """The part of one client's plan that is about frozen weights; see `Plan.offset_ranks`."""

    base_round: int
    ranks: tuple[int, ...]
    payload: bytes
