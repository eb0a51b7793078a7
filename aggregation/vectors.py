# SPDX-License-Identifier: Apache-2.0
"""Named tensors as one flat vector, the form in which mergers and robust rules compute."""

from __future__ import annotations

import math
from collections.abc import Iterator
from numbers import Real
from typing import Final

import numpy as np

from aggregation.errors import MergeError
from protocol.tensors import ParamSpec, Tensors

_FLOATS: Final = ("float16", "float32", "float64")


def require_floats(spec: ParamSpec) -> None:
    """Raises: MergeError for tensors of other types, whose mean would have fractions."""
    for name, entry in spec.entries:
        if entry.dtype not in _FLOATS:
            raise MergeError(f'tensor "{name}" is {entry}; expected floats, a mean has fractions')


def checked_weight(weight: object) -> float:
    """An update's weight, as a float. Raises: MergeError unless it is finite and above 0."""
    if isinstance(weight, bool) or not isinstance(weight, Real):
        raise MergeError(f"weight: expected a number, found a {type(weight).__name__}")
    try:
        factor = float(weight)
    except OverflowError:  # an integer beyond the range of floats
        factor = math.inf
    if not (math.isfinite(factor) and factor > 0):
        raise MergeError(f"weight: expected a finite number above 0, found {factor}")
    return factor


def checked_vector(spec: ParamSpec, update: Tensors) -> np.ndarray:
    """An update as `flat` gives it. Raises: MergeError if it does not fit or is not finite."""
    if problem := spec.mismatch(update):
        raise MergeError(f"cannot merge: {problem}")
    vector = flat(spec, update)
    if not np.isfinite(vector).all():
        first = next(name for name, part in named(spec, vector) if not np.isfinite(part).all())
        raise MergeError(f'tensor "{first}": expected finite values, found NaN or infinity')
    return vector


def flat(spec: ParamSpec, tensors: Tensors) -> np.ndarray:
    """A new float64 vector [size] in name order."""
    if not spec.entries:
        return np.empty(0)
    return np.concatenate([tensors[name].reshape(-1) for name in spec.names], dtype=np.float64)


def named(spec: ParamSpec, vector: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Each tensor's part of a flat vector, a view."""
    start = 0
    for name, entry in spec.entries:
        yield name, vector[start : start + entry.size]
        start += entry.size


def shaped(spec: ParamSpec, vector: np.ndarray) -> dict[str, np.ndarray]:
    """A flat vector as new tensors of the spec's shapes and dtypes.

    Raises: MergeError where a value is not finite in the tensor's own type.
    """
    tensors = {}
    for name, part in named(spec, vector):
        with np.errstate(over="ignore"):  # refused by name, just below
            tensor = part.astype(spec[name].dtype).reshape(spec[name].shape)
        if not np.isfinite(tensor).all():
            raise MergeError(f'tensor "{name}": expected a finite merged change, found none')
        tensors[name] = tensor
    return tensors
