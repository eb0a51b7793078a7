# SPDX-License-Identifier: Apache-2.0
"""Clients whose images look different, over any split of the labels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from simulations.datasets.domains import DOMAINS, mixed_domains
from simulations.errors import PartitionError
from simulations.partitions.iid import Iid
from simulations.partitions.partitioner import Column, Partitioner


@dataclass(frozen=True, slots=True, kw_only=True)
class Domains:
    """Splits as `base` does and says which domain each image is moved to.

    "mixed": every client holds all domains in equal parts; "one-per-client": client i holds the
    domain i mod 5 alone.
    """

    kind: Literal["mixed", "one-per-client"]
    base: Partitioner = field(default_factory=Iid)

    def __post_init__(self) -> None:
        if self.kind not in ("mixed", "one-per-client"):
            raise PartitionError(
                f'domains: expected "mixed" or "one-per-client", found {self.kind}'
            )
        if isinstance(self.base, Domains):
            raise PartitionError("domains: expected a split of labels or groups under the domains")

    @property
    def column(self) -> Column:
        """The base's column."""
        return self.base.column

    def split(self, column: np.ndarray, n: int, rng: np.random.Generator) -> list[np.ndarray]:
        """See `Partitioner.split`."""
        return self.base.split(column, n, rng)

    def client_domain(self, client: int) -> str:
        """What client number `client` is called by in reports: a domain, or "mixed"."""
        return DOMAINS[client % len(DOMAINS)] if self.kind == "one-per-client" else "mixed"

    def image_domains(self, client: int, samples: int, rng: np.random.Generator) -> np.ndarray:
        """The domain of each of a client's images, int64 [samples], an index into `DOMAINS`."""
        if self.kind == "one-per-client":
            return np.full(samples, client % len(DOMAINS), dtype=np.int64)
        return mixed_domains(samples, rng)
