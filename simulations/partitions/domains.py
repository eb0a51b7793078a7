# SPDX-License-Identifier: Apache-2.0
"""Clients whose images look different, over any split of the labels."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from simulations.datasets.domains import DOMAINS, mixed_domains
from simulations.errors import PartitionError
from simulations.partitions.iid import Iid
from simulations.partitions.partitioner import Column, Partitioner


@dataclass(frozen=True, slots=True, kw_only=True)
class Domains:
    """Splits as `base` does and says which domain each image is moved to.

    Client i holds `per_client` of the five domains, in equal parts: those from number i mod 5 on,
    the first following the last. So with one, every client has a domain alone; with five, all do.
    """

    per_client: int
    base: Partitioner = field(default_factory=Iid)

    def __post_init__(self) -> None:
        if not 1 <= self.per_client <= len(DOMAINS):
            raise PartitionError(
                f"domains: expected 1 to {len(DOMAINS)} domains a client, found {self.per_client}"
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
        """What client number `client` is called by in reports: its domains, or "mixed"."""
        if self.per_client == len(DOMAINS):
            return "mixed"
        return "+".join(DOMAINS[domain] for domain in self._domains(client))

    def image_domains(self, client: int, samples: int, rng: np.random.Generator) -> np.ndarray:
        """The domain of each of a client's images, int64 [samples], an index into `DOMAINS`."""
        return mixed_domains(samples, rng, self._domains(client))

    def _domains(self, client: int) -> list[int]:
        return sorted((client + place) % len(DOMAINS) for place in range(self.per_client))
