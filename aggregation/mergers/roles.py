# SPDX-License-Identifier: Apache-2.0
"""Which tensors a round is about, by what its merger makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from aggregation.mergers.fedsa_lora import FedSALoRA
from aggregation.mergers.ffa_lora import FFALoRA
from aggregation.mergers.merger import Merger
from aggregation.mergers.rolora import RoLoRA
from protocol.tensors import NOTHING, Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """What clients are sent, what they train and what they share, as words of
    `protocol.factors.CHOICES`."""

    sends: str = "all"
    trains: str = "all"
    shares: str = "all"


ALL: Final = Roles()
ONE_FACTOR: Final = Roles(sends="up", trains="up", shares="up")
"""A stays as the bundle has it, so that it is never sent."""


def roles_of(merger: Merger[Any], memory: Tensors = NOTHING) -> Roles:
    """The roles of the round that starts from a merger's memory."""
    match merger:
        case FFALoRA():
            return ONE_FACTOR
        case RoLoRA():
            # B first; what the last rounds changed of A is sent along, for those who missed it.
            down = {pair.down for pair in merger.pairs}
            turn = "up" if down & set(merger.frozen(memory)) else "down"
            return Roles(trains=turn, shares=turn)
        case FedSALoRA():
            return Roles(sends="down-only", shares="down-only")
        case _:
            return ALL
