# SPDX-License-Identifier: Apache-2.0
"""A round's updates as they are gathered by rules that must see all of them at once: the `init` and
`add` that these rules share. *Cost* one float32 row an update, in memory up to the budget of
`Stack` and on disk beyond it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from aggregation.errors import MergeError
from aggregation.stack import Stack
from aggregation.vectors import checked_vector, checked_weight, named, require_floats
from protocol.tensors import ParamSpec, Tensors

_LARGEST: Final = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """What has been added, in the order of `add`."""

    spec: ParamSpec
    rows: Stack  # float32 [n_clients, size], tensors in name order
    weights: tuple[float, ...]
    clients: tuple[str, ...]
    memory: Tensors  # of the last round

    def __len__(self) -> int:
        return len(self.rows)


def nothing_gathered(spec: ParamSpec, memory: Tensors) -> Gathered:
    """No update yet. Raises: MergeError for tensors that are not floats."""
    require_floats(spec)
    return Gathered(spec=spec, rows=Stack(spec.size), weights=(), clients=(), memory=memory)


def gathered(state: Gathered, update: Tensors, weight: float, client: str) -> Gathered:
    """One update more. Raises: MergeError for updates and weights that cannot be merged."""
    factor = checked_weight(weight)
    return with_row(state, checked_row(state.spec, update), factor, client)


def with_row(state: Gathered, vector: np.ndarray, weight: float, client: str) -> Gathered:
    """One update more, which `checked_row` gave and a rule may have changed."""
    return Gathered(
        spec=state.spec,
        rows=state.rows.with_row(vector),
        weights=(*state.weights, weight),
        clients=(*state.clients, client),
        memory=state.memory,
    )


def checked_row(spec: ParamSpec, update: Tensors) -> np.ndarray:
    """An update as a new float64 vector [size], all of it within the range of float32.

    Raises: MergeError if it does not fit the spec, or not that range; so squares cannot overflow.
    """
    vector = checked_vector(spec, update)
    for name, part in named(spec, vector):
        largest = float(np.abs(part).max())
        if largest > _LARGEST:
            raise MergeError(
                f'tensor "{name}": expected values within float32, found one of {largest:g}'
            )
    return vector


def require_some(rule: str, count: int) -> None:
    """Raises: MergeError if nothing was added."""
    if count == 0:
        raise MergeError(f"{rule}: expected one update or more, nothing was added")
