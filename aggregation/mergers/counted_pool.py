# SPDX-License-Identifier: Apache-2.0
"""The mean of pools element by element, each weighted by how often a client used it.

A pool's tensors have one leading axis of elements. In the plain index-wise mean of FedIns (Feng et
al., ICCV 2023, arXiv 2308.06051) an element that one client of K has trained keeps 1/K of its
change; here it keeps all of it: Σ_k n_kj Δ_kj / Σ_k n_kj, with n_kj client k's weight times the
share of its selections that fell on element j. An element that nobody selected stays as it was.

*Differs from source* in that weighting, which is ours. A client's counts decide only how its own
weight is spread over the elements, not how large it is.
*Cost* two float64 copies of the tensors, however many clients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from aggregation.errors import MergeError
from aggregation.mergers.merger import Merged
from aggregation.vectors import checked_vector, checked_weight, require_floats
from protocol.tensors import NOTHING, ParamSpec, Tensors

COUNTS: Final = "selected"
"""The entry of an update that holds its counts, [elements], beside the tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolState:
    """What has been added."""

    spec: ParamSpec
    elements: int
    sums: dict[str, np.ndarray]  # float64, Σ n_kj Δ_kj
    weights: np.ndarray  # float64 [elements], Σ n_kj
    count: int


@dataclass(frozen=True, slots=True)
class CountedPool:
    """The mean of every element over the clients that used it."""

    name: ClassVar[str] = "counted-pool"
    sum_only: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    order_independent: ClassVar[bool] = False

    def init(
        self, spec: ParamSpec, *, current: Tensors = NOTHING, memory: Tensors = NOTHING
    ) -> PoolState:
        """Zero sums. Raises: MergeError unless all tensors have the same leading axis."""
        sizes = {entry.shape[0] if entry.shape else 0 for _, entry in spec.entries}
        if len(sizes) != 1 or 0 in sizes:
            raise MergeError(
                "counted-pool: expected tensors with one leading axis of elements, found axes of "
                f"{', '.join(map(str, sorted(sizes))) or 'no tensor'}"
            )
        require_floats(spec)
        (elements,) = sizes
        sums = {name: np.zeros(entry.shape) for name, entry in spec.entries}
        return PoolState(
            spec=spec, elements=elements, sums=sums, weights=np.zeros(elements), count=0
        )

    def add(
        self, state: PoolState, update: Tensors, weight: float, *, client: str = ""
    ) -> PoolState:
        """One update more, with its counts under `COUNTS`. Raises: MergeError."""
        factor = checked_weight(weight)
        tensors = {name: value for name, value in update.items() if name != COUNTS}
        checked_vector(state.spec, tensors)
        own = factor * _shares(update.get(COUNTS), state.elements)
        sums = {}
        for name, before in state.sums.items():
            spread = own.reshape(-1, *[1] * (before.ndim - 1))
            sums[name] = before + spread * tensors[name]
        weights = state.weights + own
        if not (np.isfinite(weights).all() and all(np.isfinite(s).all() for s in sums.values())):
            raise MergeError(
                f"weight: expected a finite weighted sum, {factor:g} is too large for it"
            )
        return PoolState(
            spec=state.spec,
            elements=state.elements,
            sums=sums,
            weights=weights,
            count=state.count + 1,
        )

    def finish(self, state: PoolState) -> Merged:
        """The means. Raises: MergeError if nothing was added."""
        if state.count == 0:
            raise MergeError("counted-pool: expected one update or more, nothing was added")
        used = np.where(state.weights > 0, state.weights, 1.0)
        delta = {}
        for name, entry in state.spec.entries:
            spread = used.reshape(-1, *[1] * (len(entry.shape) - 1))
            delta[name] = (state.sums[name] / spread).astype(entry.dtype)
        return Merged(delta=delta)


def _shares(counts: np.ndarray | None, elements: int) -> np.ndarray:
    """Counts as shares of 1, float64 [elements]. Raises: MergeError."""
    if counts is None:
        raise MergeError(
            "counted-pool: expected how often each element was selected, the update does not say; "
            'let clients tell it (update.metrics = "loss,selected")'
        )
    given = np.asarray(counts, np.float64)
    if given.shape != (elements,):
        raise MergeError(
            f"counted-pool: expected {elements} counts, one an element, found {list(given.shape)}"
        )
    if not (np.isfinite(given).all() and (given >= 0).all() and given.sum() > 0):
        raise MergeError("counted-pool: expected counts of 0 or more that are not all 0")
    return given / given.sum()
