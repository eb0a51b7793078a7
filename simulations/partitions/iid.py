# SPDX-License-Identifier: Apache-2.0
"""Every client sees the same distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from simulations.partitions.partitioner import Column, check_sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Iid:
    """A shuffled deck, dealt evenly: sizes differ by at most 1, and every example is dealt."""

    column: ClassVar[Column] = "labels"

    def split(self, column: np.ndarray, n: int, rng: np.random.Generator) -> list[np.ndarray]:
        """See `Partitioner.split`."""
        check_sizes(column, n)
        return [np.sort(part) for part in np.array_split(rng.permutation(len(column)), n)]
