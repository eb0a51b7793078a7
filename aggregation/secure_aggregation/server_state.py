# SPDX-License-Identifier: Apache-2.0
"""What the server of a secure sum knows between any two answers, and the sum that it comes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from aggregation.secure_aggregation.context import Context
from aggregation.secure_aggregation.messages import Advertisement, Consent, Reveal, SealedShares
from aggregation.secure_aggregation.outcomes import Aborted, Fault, Reason


class Stage(IntEnum):
    """Which answer is awaited."""

    KEYS = 0
    SHARES = 1
    VECTORS = 2
    CONSENTS = 3
    REVEALS = 4
    OVER = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerState:
    """All that the server knows of an attempt. Clients are places in `context.names`."""

    context: Context
    attempt: bytes
    edges: tuple[tuple[int, ...], ...] = field(repr=False)
    stage: Stage
    asked: frozenset[int]  # whom this stage's message went to
    answered: Mapping[int, bytes]  # SHA-256 of this stage's answers
    advertised: Mapping[int, Advertisement] = field(repr=False)
    sealed: Mapping[int, SealedShares] = field(repr=False)
    holders: frozenset[int] = frozenset()  # those whose shares were passed on
    commitments: Mapping[int, bytes] = field(default_factory=dict, repr=False)  # to their seeds
    total: np.ndarray | None = field(default=None, repr=False)
    survivors: tuple[int, ...] = ()
    consents: Mapping[int, Consent] = field(default_factory=dict, repr=False)
    reveals: Mapping[int, Reveal] = field(default_factory=dict, repr=False)
    dropped: Mapping[int, Fault] = field(default_factory=dict)

    def waiting_for(self) -> tuple[str, ...]:
        """Names of those who have yet to answer this stage; nobody after the end."""
        if self.stage is Stage.OVER:
            return ()
        open_ = self.asked - set(self.answered) - set(self.dropped)
        return tuple(self.context.names[place] for place in sorted(open_))


@dataclass(frozen=True, slots=True, kw_only=True)
class SecureSum:
    """The sum modulo 2^bits of the vectors of `members`, uint16 or uint32 [d]."""

    values: np.ndarray
    members: tuple[str, ...]


def too_few_holders(state: ServerState, lonely: Sequence[int], what: str) -> Aborted:
    """The end of an attempt in which those clients' secrets cannot be had."""
    names = tuple(state.context.names[place] for place in lonely)
    detail = (
        f"of {len(lonely)} clients fewer than {state.context.threshold} neighbours {what}; "
        "their masks cannot be removed"
    )
    return Aborted(reason=Reason.TOO_FEW_PEERS, detail=detail, names=names)
