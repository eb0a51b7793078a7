# SPDX-License-Identifier: Apache-2.0
"""The clients that the data really came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulations.errors import PartitionError
from simulations.partitions.partitioner import Column, check_sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Natural:
    """The `n` largest groups, largest first (ties by name), one a client. Smaller groups are left
    out, so that this partition is not complete."""

    column: ClassVar[Column] = "groups"

    def split(self, column: np.ndarray, n: int, rng: np.random.Generator) -> list[np.ndarray]:
        """See `Partitioner.split`; nothing here is drawn by chance."""
        check_sizes(column, n)
        names, inverse, counts = np.unique(column, return_inverse=True, return_counts=True)
        if n > len(names):
            raise PartitionError(
                f"natural: expected at most {len(names)} clients, one for each group of the data "
                f"set, found {n}"
            )
        largest = np.argsort(-counts, kind="stable")[:n]  # names are sorted: ties fall by name
        return [np.flatnonzero(inverse == group) for group in largest]
