# SPDX-License-Identifier: Apache-2.0
"""Which clients a round asks, and what each of them has for itself: a seed and a rank."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from protocol.readiness import Readiness


def eligible(
    said: Mapping[str, Readiness], *, min_samples: int = 0, min_memory_mb: int = 0
) -> tuple[list[str], dict[str, str]]:
    """The clients that may be asked, sorted, and what keeps each of the others.

    A client that does not tell what is asked for does not have it.
    """
    kept = {}
    for name, readiness in said.items():
        if reason := _unfit(readiness, min_samples, min_memory_mb):
            kept[name] = reason
    return sorted(said.keys() - kept.keys()), kept


def choose_clients(names: Sequence[str], count: int, seed: int, number: int) -> list[str]:
    """A round's clients, sorted: `count` of them, or all when it is 0 or there are no more.

    Depends on the names, the seed and the round's number, and on nothing that ran before.
    """
    known = sorted(names)
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


def _unfit(readiness: Readiness, min_samples: int, min_memory_mb: int) -> str:
    """What keeps a client; "" for nothing."""
    if not readiness.ready:
        return readiness.reason or "it says that it is not ready, and not why"
    for told, least, what in (
        (readiness.samples, min_samples, "samples, rounds.min_samples"),
        (readiness.free_memory_mb, min_memory_mb, "MiB of free memory, rounds.min_memory_mb"),
    ):
        if least and (told is None or told < least):
            amount = "an unknown number of" if told is None else f"{told}"
            return f"it has {amount} {what} asks for {least}"
    return ""


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
