# SPDX-License-Identifier: Apache-2.0
"""Uneven classes and uneven sizes, from one number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulations.errors import PartitionError
from simulations.partitions.partitioner import Column, check_sizes

MIN_ALPHA = 1e-3  # below, nearly every class falls to one client and the draw underflows
MAX_ALPHA = 1e6  # above, it is IID but for rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class Dirichlet:
    """Each class is dealt to the clients in proportions drawn from a symmetric Dirichlet(alpha).

    Small `alpha` (0.1) gives clients of few classes and very different sizes, some of them empty;
    large `alpha` tends to IID. Every example is dealt.

    Source: Yurochkin et al. 2019 (arXiv:1905.12022), section 4, the form in common use.
    Differs from Hsu et al. 2019 (arXiv:1909.06335), who draw the class proportions of each client
    instead, and give all clients the same size.
    """

    alpha: float
    column: ClassVar[Column] = "labels"

    def __post_init__(self) -> None:
        if not MIN_ALPHA <= self.alpha <= MAX_ALPHA:
            raise PartitionError(
                f"dirichlet: expected alpha of {MIN_ALPHA} to {MAX_ALPHA:g}, found {self.alpha}"
            )

    def split(self, column: np.ndarray, n: int, rng: np.random.Generator) -> list[np.ndarray]:
        """See `Partitioner.split`."""
        check_sizes(column, n)
        owner = np.empty(len(column), dtype=np.int64)
        for label in np.unique(column):
            members = rng.permutation(np.flatnonzero(column == label))
            shares = rng.dirichlet(np.full(n, self.alpha))
            # Rounding the cumulated shares deals every example, whatever the shares' rounding.
            cuts = np.rint(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
            for client, part in enumerate(np.split(members, cuts)):
                owner[part] = client
        return [np.flatnonzero(owner == client) for client in range(n)]
