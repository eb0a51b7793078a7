# SPDX-License-Identifier: Apache-2.0
"""The weighted mean of the updates, as they come.

*Source* McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized
Data", AISTATS 2017 (arXiv 1602.05629), algorithm 1: w ← Σ nₖ wₖ / Σ nₖ.
*Cost* time linear in each update; memory two float64 copies of the tensors and `TOGETHER` updates,
however many clients. Sums are float64: one order of `add` gives one result on one machine, bit for
bit; another order may differ in the last bit of a float32.

Updates are summed a few at a time, block by block, as a product of their weights and a matrix that
stays in the cache: sums of large updates are otherwise read from memory and written back for each
of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from aggregation.errors import MergeError
from aggregation.mergers.merger import Merged
from aggregation.vectors import checked_weight, require_floats, shaped
from protocol.tensors import NOTHING, ParamSpec, Tensors

TOGETHER: Final = 16
_BLOCK: Final = 8192  # values; 64 KiB of sums
# Below this a float32 update cannot take a float64 sum beyond its range, however many there are.
_SAFE_WEIGHT: Final = 1e200


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanState:
    """What has been added."""

    spec: ParamSpec
    sums: np.ndarray  # float64 [size], Σ weight · tensor of the settled updates, in name order
    weight: float  # Σ weight
    count: int  # updates
    pending: tuple[tuple[Tensors, float], ...] = ()  # updates that `sums` does not hold yet

    def settled(self) -> np.ndarray:
        """Σ weight · tensor of all updates, float64 [size]."""
        return _summed(self.spec, self.sums, self.pending) if self.pending else self.sums

    def mean(self) -> np.ndarray:
        """The weighted mean, float64 [size]. Raises: MergeError if nothing was added."""
        if self.count == 0:
            raise MergeError("weighted mean: expected one update or more, nothing was added")
        return self.settled() / self.weight


@dataclass(frozen=True, slots=True)
class WeightedMean:
    """Streaming weighted mean."""

    name: ClassVar[str] = "weighted-mean"
    sum_only: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    order_independent: ClassVar[bool] = False

    def init(
        self, spec: ParamSpec, *, current: Tensors = NOTHING, memory: Tensors = NOTHING
    ) -> MeanState:
        """Zero sums."""
        require_floats(spec)
        return MeanState(spec=spec, sums=np.zeros(spec.size), weight=0.0, count=0)

    def add(
        self, state: MeanState, update: Tensors, weight: float, *, client: str = ""
    ) -> MeanState:
        """One update more; `weight` is finite and above 0."""
        factor = checked_weight(weight)
        if problem := state.spec.mismatch(update):
            raise MergeError(f"cannot merge: {problem}")
        total_weight = state.weight + factor
        if not math.isfinite(total_weight):
            raise MergeError(f"weight: expected a finite sum of weights, {factor:g} is too large")
        _require_finite(update, factor)
        sums, pending = state.sums, (*state.pending, (update, factor))
        if len(pending) == TOGETHER or not _is_safe(state.spec, factor):
            sums, pending = _summed(state.spec, sums, pending), ()
            _require_finite_sums(state.spec, sums, factor)
        return MeanState(
            spec=state.spec,
            sums=sums,
            weight=total_weight,
            count=state.count + 1,
            pending=pending,
        )

    def finish(self, state: MeanState) -> Merged:
        """Sums over total weight, in the dtypes of the spec."""
        return Merged(delta=shaped(state.spec, state.mean()))


def _summed(
    spec: ParamSpec, sums: np.ndarray, updates: tuple[tuple[Tensors, float], ...]
) -> np.ndarray:
    """The sums and the updates, as a new vector."""
    new = np.empty_like(sums)
    weights = np.array([weight for _, weight in updates])
    longest = max((entry.size for _, entry in spec.entries), default=0)
    rows = np.empty((len(updates), min(_BLOCK, longest)))
    start = 0
    with np.errstate(over="ignore", invalid="ignore"):  # refused by name, in `add`
        for name, entry in spec.entries:
            flat = [update[name].reshape(-1) for update, _ in updates]
            for first in range(0, entry.size, _BLOCK):
                part = slice(first, min(first + _BLOCK, entry.size))
                place = slice(start + part.start, start + part.stop)
                block = rows[:, : part.stop - part.start]
                for row, values in zip(block, flat, strict=True):
                    row[:] = values[part]
                np.add(sums[place], weights @ block, out=new[place])
            start += entry.size
    return new


def _is_safe(spec: ParamSpec, weight: float) -> bool:
    """Whether a sum of such updates stays finite by their range alone."""
    wide = any(entry.dtype == "float64" for _, entry in spec.entries)
    return weight <= _SAFE_WEIGHT and not wide


def _require_finite(update: Tensors, weight: float) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        for name, value in update.items():
            # A sum of squares is finite only if every value is, and is read at memory's speed.
            if not math.isfinite(np.vdot(value, value)) and not np.isfinite(value).all():
                raise _not_finite(name, weight)


def _require_finite_sums(spec: ParamSpec, sums: np.ndarray, weight: float) -> None:
    start = 0
    for name, entry in spec.entries:
        if not np.isfinite(sums[start : start + entry.size]).all():
            raise _not_finite(name, weight)
        start += entry.size


def _not_finite(name: str, weight: float) -> MergeError:
    return MergeError(
        f'tensor "{name}": expected values whose weighted sum is finite, found NaN or infinity '
        f"(weight {weight:g}); check updates before they are merged"
    )
