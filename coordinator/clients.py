# SPDX-License-Identifier: Apache-2.0
"""Which clients a round asks, and what each of them has for itself: a seed and a rank."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from coordinator.errors import NoClientsError


def choose_clients(names: Sequence[str], count: int, seed: int, number: int) -> list[str]:
    """A round's clients, sorted: `count` of them, or all when it is 0 or there are no more.

    Depends on the names, the seed and the round's number, and on nothing that ran before.

    Raises: NoClientsError when there is none.
    """
    known = sorted(names)
    if not known:
        raise NoClientsError(f"round {number}: expected at least one client, none is connected")
    if not 0 < count < len(known):
        return known
    drawn = np.random.default_rng([seed, number]).choice(len(known), count, replace=False)
    return [known[index] for index in sorted(drawn)]


def client_seed(seed: int, number: int, client: str) -> int:
    """The seed of one client's work in one round, whoever else takes part."""
    return _hash(f"{seed}/{number}/{client}") >> 1


def client_rank(ranks: Sequence[int], client: str) -> int:
    """The rank of a client's factors: one of `ranks`, by its name and so for good; 0 for none."""
    return ranks[_hash(client) % len(ranks)] if ranks else 0


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
