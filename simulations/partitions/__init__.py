# SPDX-License-Identifier: Apache-2.0
"""Partitions of a training set over clients (IID, Dirichlet, shards, natural, shifted domains),
and the one place where their names are read."""

from __future__ import annotations

import re

from simulations.datasets.domains import DOMAINS
from simulations.errors import PartitionError
from simulations.partitions.dirichlet import Dirichlet
from simulations.partitions.domains import Domains
from simulations.partitions.iid import Iid
from simulations.partitions.natural import Natural
from simulations.partitions.partitioner import Partitioner
from simulations.partitions.shards import Shards

__all__ = [
    "PARTITION_NAMES",
    "Dirichlet",
    "Domains",
    "Iid",
    "Natural",
    "Partitioner",
    "Shards",
    "partition_named",
]

PARTITION_NAMES = (
    "iid",
    "dirichlet:ALPHA",
    "shards:COUNT",
    "natural",
    "domains:mixed",
    "domains:one-per-client",
    "domains:COUNT (of the five, 1 to 5 a client)",
    "domains:mixed,dirichlet:ALPHA (or any other after the comma)",
)
_NUMBER = re.compile(r"([0-9]+(\.[0-9]*)?|\.[0-9]+)(e-?[0-9]{1,3})?")
_COUNT = re.compile(r"[0-9]{1,9}")


def partition_named(name: str) -> Partitioner:
    """Reads "iid", "dirichlet:0.3", "shards:2", "natural", "domains:mixed",
    "domains:one-per-client", "domains:2", or one of the last three with a base:
    "domains:mixed,dirichlet:0.3". "domains" alone is "domains:mixed".

    Raises: PartitionError listing the known names.
    """
    first, comma, base = name.partition(",")
    split = _split_named(base if comma else "iid")
    if split and (per_client := _domains_each(first)) is not None:
        return Domains(per_client=per_client, base=split)
    plain = _split_named(name)
    if plain is None:
        raise PartitionError(f'partition "{name}": expected one of {", ".join(PARTITION_NAMES)}')
    return plain


def _domains_each(name: str) -> int | None:
    match name.partition(":"):
        case ("domains", "", "") | ("domains", ":", "mixed"):
            return len(DOMAINS)
        case "domains", ":", "one-per-client":
            return 1
        case "domains", ":", count if _COUNT.fullmatch(count):
            return int(count)
    return None


def _split_named(name: str) -> Partitioner | None:
    kind, _, setting = name.partition(":")
    match kind:
        case "iid" if name == "iid":
            return Iid()
        case "natural" if name == "natural":
            return Natural()
        case "dirichlet" if _NUMBER.fullmatch(setting):
            return Dirichlet(alpha=float(setting))
        case "shards" if _COUNT.fullmatch(setting):
            return Shards(per_client=int(setting))
        case _:
            return None
