# SPDX-License-Identifier: Apache-2.0
"""Integers of b bits on a grid that is the same for all clients, so that they can be summed.

A value v in units of σ (common_grid.py) is brought to the range ±R, R = 4.5, and rounded up or down
by chance to one of L + 1 = 2ᵇ points, so that its mean is v: the errors of many clients cancel.
Each single error is below a step, 2R/L; of an update of the full norm about 7 values in a million
lie beyond the range.

*Source* as common_grid.py; the range and the rounding are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from aggregation.codecs.codec import Seeds
from aggregation.codecs.common_grid import ROUNDING, CommonGrid, checked_norm
from aggregation.codecs.top_k import checked_density
from aggregation.errors import CodecError
from protocol.tensors import ParamSpec

RANGE: Final = 4.5
MAX_BITS: Final = 16

_BLOCK: Final = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid(CommonGrid):
    """b bits a value in the clear, b + ⌈log₂ m⌉ under a mask with m clients."""

    bits: int
    norm: float
    """C: what is longer is shortened to it; σ and with it the grid follow from it."""
    density: float = 1.0
    """Part of the rotated values that is sent, the same for all clients of a round."""

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int):
            raise CodecError(f"grid, bits: expected a whole number, found {self.bits!r}")
        if not 1 <= self.bits <= MAX_BITS:
            raise CodecError(f"grid, bits: expected 1 to {MAX_BITS}, found {self.bits}")
        object.__setattr__(self, "norm", checked_norm("grid", self.norm))
        object.__setattr__(self, "density", checked_density(self.density))

    @property
    def name(self) -> str:
        """`grid:BITS,NORM` or `grid:BITS,NORM,DENSITY`."""
        return f"grid:{self.bits},{self.norm!r}" + (
            f",{self.density!r}" if self.density < 1 else ""
        )

    @property
    def levels(self) -> int:
        """2ᵇ - 1."""
        return (1 << self.bits) - 1

    def reach(self, spec: ParamSpec) -> float:
        """C and a step for each value."""
        return (self.norm + self.step(spec) * math.sqrt(self.length(spec))) * (1 + ROUNDING)

    def to_grid(self, values: np.ndarray, seeds: Seeds) -> np.ndarray:
        """Rounded by `seeds.own`."""
        rng = np.random.Generator(np.random.PCG64(seeds.own))
        integers = np.empty(values.size, np.uint32)
        for start in range(0, values.size, _BLOCK):
            part = values[start : start + _BLOCK].astype(np.float64)
            np.clip((part + RANGE) * (self.levels / (2 * RANGE)), 0, self.levels, out=part)
            floor = np.floor(part)
            up = rng.random(part.size, np.float32) < part - floor
            integers[start : start + _BLOCK] = floor.astype(np.uint32) + up
        return integers

    def from_grid(self, means: np.ndarray) -> np.ndarray:
        """Linear in the means."""
        return means * np.float32(2 * RANGE / self.levels) - np.float32(RANGE)
