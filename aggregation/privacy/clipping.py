# SPDX-License-Identifier: Apache-2.0
"""Flat clipping: an update is scaled down to a norm that no client's can exceed.

Δ ← Δ·min(1, C/‖Δ‖), with the l2 norm of all tensors together.

*Source* McMahan, Ramage, Talwar, Zhang, "Learning Differentially Private Recurrent Language
Models", ICLR 2018 (arXiv 1710.06963), flat clipping.
*Differs from source* Scaled values are cut to float32 towards zero and not to the nearest: rounding
would leave about half of all clipped updates longer than C, and sensitivity is a bound or nothing.
An update of norm 0 is left as it is; one that is not finite is refused, for no factor mends it.
*Cost* two passes; memory one copy of the tensors, and one tensor in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from aggregation.errors import PrivacyError
from protocol.tensors import Tensors

# Squares are summed block by block, and the blocks exactly: a norm is right to 2^-42 of itself, and
# what is clipped stays below C by more than two norms may be wrong.
_BLOCK: Final = 2048
_SLACK: Final = 1 - 2.0**-40


@dataclass(frozen=True, slots=True, kw_only=True)
class Clipped:
    """An update that is no longer than the bound."""

    delta: Mapping[str, np.ndarray]
    """New float32 tensors where it was cut, those given where it was not."""
    norm: float
    """Before."""
    unclipped: bool
    """Whether it was no longer than the bound as it came."""


def l2_norm(delta: Tensors) -> float:
    """√Σ‖tensor‖² over all tensors, in float64; NaN or infinity where a value is."""
    return math.sqrt(math.fsum(part for value in delta.values() for part in _squares(value)))


def clip(delta: Tensors, bound: float) -> Clipped:
    """The update with an l2 norm of at most `bound`; clipped again, it is the same bits.

    Args:
        delta: float32 tensors; they are not written to.
        bound: C, finite and above 0.

    Raises: PrivacyError for another bound, tensors of another type, or values that are not finite.
    """
    require_bound(bound)
    for name, value in delta.items():
        if value.dtype != np.float32:
            raise PrivacyError(f'tensor "{name}": expected float32 to clip, found {value.dtype}')
        if not np.isfinite(value).all():
            raise PrivacyError(f'tensor "{name}": expected finite values, found NaN or infinity')
    norm = l2_norm(delta)
    if norm <= bound:
        return Clipped(delta=dict(delta), norm=norm, unclipped=True)
    factor = bound / norm * _SLACK
    shorter = {name: _towards_zero(value * np.float64(factor)) for name, value in delta.items()}
    return Clipped(delta=shorter, norm=norm, unclipped=False)


def require_bound(bound: object) -> None:
    """Raises: PrivacyError unless it is a finite number above 0."""
    number = isinstance(bound, int | float) and not isinstance(bound, bool)
    if not (number and 0 < bound < math.inf):  # type: ignore[operator]
        raise PrivacyError(f"clip: expected a finite norm above 0, found {bound!r}")


def _squares(value: np.ndarray) -> Iterator[float]:
    """Sums of squares that add up to that of the tensor."""
    flat = value.reshape(-1)
    whole = len(flat) // _BLOCK * _BLOCK
    if whole:
        rows = flat[:whole].reshape(-1, _BLOCK).astype(np.float64)
        yield from np.einsum("ij,ij->i", rows, rows).tolist()
    rest = flat[whole:].astype(np.float64)
    yield float(rest @ rest)


def _towards_zero(wide: np.ndarray) -> np.ndarray:
    narrow = wide.astype(np.float32)
    longer = np.abs(narrow.astype(np.float64)) > np.abs(wide)
    return np.where(longer, np.nextafter(narrow, np.float32(0)), narrow)
