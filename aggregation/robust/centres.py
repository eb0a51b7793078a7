# SPDX-License-Identifier: Apache-2.0
"""Where a rule that starts from the last round's end keeps that: arrays "centre/NAME"."""

from __future__ import annotations

from typing import Final

import numpy as np

from aggregation.errors import MergeError
from aggregation.vectors import named
from protocol.tensors import ParamSpec, Tensors

_PREFIX: Final = "centre/"


def kept_centre(spec: ParamSpec, centre: np.ndarray) -> dict[str, np.ndarray]:
    """A flat centre, [size], as arrays of its type for a merger's memory."""
    return {
        _PREFIX + name: part.reshape(spec[name].shape).copy() for name, part in named(spec, centre)
    }


def last_centre(spec: ParamSpec, memory: Tensors) -> np.ndarray:
    """Where the last round ended, float64 [size]; 0 where there was none.

    Raises: MergeError if the memory is not that of such tensors.
    """
    centre = np.zeros(spec.size)
    if not any(name.startswith(_PREFIX) for name in memory):
        return centre
    for name, part in named(spec, centre):
        kept, shape = memory.get(_PREFIX + name), spec[name].shape
        if kept is None or kept.shape != shape or not np.isfinite(kept).all():
            found = "none" if kept is None else f"{kept.dtype} {list(kept.shape)}"
            raise MergeError(
                f'memory "{_PREFIX}{name}": expected finite values of shape {list(shape)}, '
                f"found {found}"
            )
        part[:] = kept.reshape(-1)
    return centre
