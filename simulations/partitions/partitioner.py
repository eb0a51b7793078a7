# SPDX-License-Identifier: Apache-2.0
"""How a training set falls to clients."""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np

from simulations.errors import PartitionError

Column = Literal["labels", "groups"]


class Partitioner(Protocol):
    """Splits indices by one column of the data set."""

    @property
    def column(self) -> Column:
        """Which column `split` reads: the labels, or who the examples came from."""

    def split(self, column: np.ndarray, n: int, rng: np.random.Generator) -> list[np.ndarray]:
        """The examples of each of `n` clients.

        Shapes: column [n_samples]; returns n arrays int64, disjoint, each sorted, possibly empty.
        """


def check_sizes(column: np.ndarray, n: int) -> None:
    """Refuses what no partition can split."""
    if n < 1:
        raise PartitionError(f"expected at least 1 client, found {n}")
    if column.ndim != 1 or len(column) == 0:
        raise PartitionError(
            f"expected a column with at least one example, found shape {column.shape}"
        )
