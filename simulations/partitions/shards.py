# SPDX-License-Identifier: Apache-2.0
"""A few classes a client, equal sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulations.errors import PartitionError
from simulations.partitions.partitioner import Column, check_sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """The examples, sorted by class, are cut into `n * per_client` shards; each client draws
    `per_client` of them. Every example is dealt.

    Source: McMahan et al. 2017 (arXiv:1602.05629), section 3 (there 100 clients, 2 shards each).
    """

    per_client: int
    column: ClassVar[Column] = "labels"

    def __post_init__(self) -> None:
        if self.per_client < 1:
            raise PartitionError(
                f"shards: expected at least 1 shard a client, found {self.per_client}"
            )

    def split(self, column: np.ndarray, n: int, rng: np.random.Generator) -> list[np.ndarray]:
        """See `Partitioner.split`."""
        check_sizes(column, n)
        if n * self.per_client > len(column):
            raise PartitionError(
                f"shards:{self.per_client}: expected at least {n * self.per_client} examples for "
                f"{n} clients, found {len(column)}; take fewer clients or shards"
            )
        shuffled = rng.permutation(len(column))
        by_label = shuffled[np.argsort(column[shuffled], kind="stable")]
        shards = np.array_split(by_label, n * self.per_client)
        drawn = rng.permutation(len(shards)).reshape(n, self.per_client)
        return [np.sort(np.concatenate([shards[i] for i in hand])) for hand in drawn]
