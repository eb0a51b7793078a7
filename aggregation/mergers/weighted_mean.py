# SPDX-License-Identifier: Apache-2.0
"""The weighted mean of the updates, as they come.

*Source* McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized
Data", AISTATS 2017 (arXiv 1602.05629), algorithm 1: w ← Σ nₖ wₖ / Σ nₖ.
*Cost* time linear in each update; memory two float64 copies of the tensors, however many clients.
Sums are float64 in the order of `add`: one order gives one result, bit for bit; another order
may differ in the last bit of a float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar, Final

import numpy as np

from aggregation.errors import MergeError
from protocol.tensors import ParamSpec, Tensors

_FLOATS: Final = ("float16", "float32", "float64")


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanState:
    """What has been added."""

    spec: ParamSpec
    sums: np.ndarray  # float64 [size], Σ weight · tensor, in name order
    weight: float  # Σ weight
    count: int  # updates


@dataclass(frozen=True, slots=True)
class WeightedMean:
    """Streaming weighted mean."""

    sum_only: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    order_independent: ClassVar[bool] = False

    def init(self, spec: ParamSpec) -> MeanState:
        """Zero sums."""
        for name, entry in spec.entries:
            if entry.dtype not in _FLOATS:
                raise MergeError(
                    f'tensor "{name}" is {entry}; expected floats, a mean has fractions'
                )
        return MeanState(spec=spec, sums=np.zeros(spec.size), weight=0.0, count=0)

    def add(self, state: MeanState, tensors: Tensors, weight: float) -> MeanState:
        """One update more; `weight` is finite and above 0."""
        given: object = weight
        if isinstance(given, bool) or not isinstance(given, Real):
            raise MergeError(f"weight: expected a number, found a {type(given).__name__}")
        try:
            factor = float(given)
        except OverflowError:  # an integer beyond the range of floats
            factor = math.inf
        if not (math.isfinite(factor) and factor > 0):
            raise MergeError(f"weight: expected a finite number above 0, found {factor}")
        if problem := state.spec.mismatch(tensors):
            raise MergeError(f"cannot merge: {problem}")
        sums = _flat(state.spec, tensors)
        with np.errstate(over="ignore", invalid="ignore"):  # refused by name, just below
            sums *= factor
            sums += state.sums
        if not np.isfinite(sums).all():
            first = next(n for n, s in _named(state.spec, sums) if not np.isfinite(s).all())
            raise MergeError(
                f'tensor "{first}": expected values whose weighted sum is finite, found NaN or '
                f"infinity (weight {factor:g}); check updates before they are merged"
            )
        total_weight = state.weight + factor
        if not math.isfinite(total_weight):
            raise MergeError(f"weight: expected a finite sum of weights, {factor:g} is too large")
        return MeanState(spec=state.spec, sums=sums, weight=total_weight, count=state.count + 1)

    def finish(self, state: MeanState) -> dict[str, np.ndarray]:
        """Sums over total weight, in the dtypes of the spec."""
        if state.count == 0:
            raise MergeError("weighted mean: expected one update or more, nothing was added")
        spec = state.spec
        means = _named(spec, state.sums / state.weight)
        return {
            name: mean.astype(spec[name].dtype).reshape(spec[name].shape) for name, mean in means
        }


def _flat(spec: ParamSpec, tensors: Tensors) -> np.ndarray:
    """A new float64 vector in name order."""
    if not spec.entries:
        return np.empty(0)
    return np.concatenate([tensors[name].reshape(-1) for name in spec.names], dtype=np.float64)


def _named(spec: ParamSpec, vector: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    start = 0
    for name, entry in spec.entries:
        yield name, vector[start : start + entry.size]
        start += entry.size
