# SPDX-License-Identifier: Apache-2.0
"""One bit a value that can be summed: which side of 0 it is on; or three values, with 0 between.

A value v in units of σ (common_grid.py) becomes ±√(2/π), or, `ternary`, 0 within ±0.6120 and
±1.2240 beyond: the values that lose least of a normal variable. Every client's votes are worth the
same, whatever the length of its update, so that a sum of votes is all that the server needs.

*Source* the two and three levels: Max, "Quantizing for Minimum Distortion", IRE Transactions on
Information Theory 6 (1960), table I. Votes with one scale for all: Bernstein et al., "signSGD with
Majority Vote", ICLR 2019 (arXiv 1810.05291).
*Differs from source*: votes are averaged, and no majority is taken, so that the mean of what
clients sent is what comes out.

What a vote leaves behind is large, and not random: jobs want `error_feedback` beside it. An update
much shorter than the norm is stretched to about it; the next one then makes up for that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from aggregation.codecs.codec import Seeds
from aggregation.codecs.common_grid import ROUNDING, CommonGrid, checked_norm
from aggregation.codecs.quantised import require_flag
from aggregation.codecs.top_k import checked_density
from protocol.tensors import ParamSpec

TWO: Final = math.sqrt(2 / math.pi)
THREE: Final = 1.2240
BOUND: Final = 0.6120


@dataclass(frozen=True, slots=True, kw_only=True)
class Votes(CommonGrid):
    """1 or 2 bits a value in the clear; ⌈log₂(m + 1)⌉ or ⌈log₂(2m + 1)⌉ under a mask."""

    norm: float
    """C: what is longer is shortened to it; what a vote is worth follows from it."""
    ternary: bool = False
    density: float = 1.0
    """Part of the rotated values that is voted on, the same for all clients of a round."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "norm", checked_norm("votes", self.norm))
        object.__setattr__(self, "density", checked_density(self.density))
        require_flag("votes, ternary", self.ternary)

    @property
    def name(self) -> str:
        """`votes:NORM`, then `,ternary` and the density where they are."""
        return (
            f"votes:{self.norm!r}"
            + (",ternary" if self.ternary else "")
            + (f",{self.density!r}" if self.density < 1 else "")
        )

    @property
    def levels(self) -> int:
        """1, or 2 with 0 between."""
        return 2 if self.ternary else 1

    def reach(self, spec: ParamSpec) -> float:
        """Of votes none of which is 0."""
        worth = THREE if self.ternary else TWO
        return worth * self.unit(spec) * math.sqrt(self.length(spec)) * (1 + ROUNDING)

    def to_grid(self, values: np.ndarray, seeds: Seeds) -> np.ndarray:
        """0, or 1 for a value not below 0; ternary: 0, 1, 2."""
        if not self.ternary:
            return (values >= 0).astype(np.uint32)
        return (values >= -BOUND).astype(np.uint32) + (values > BOUND)

    def from_grid(self, means: np.ndarray) -> np.ndarray:
        """Linear in the means."""
        worth = THREE if self.ternary else 2 * TWO
        return (means - np.float32(self.levels / 2)) * np.float32(worth)
