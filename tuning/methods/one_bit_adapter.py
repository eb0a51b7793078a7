# SPDX-License-Identifier: Apache-2.0
"""1-bit AdaptFormer (Bi-AdaptFormer): the adapter's matrices are used as 1-bit values.

Source: Jie, Wang and Deng 2023, arXiv 2307.16867: latent float32 weights are trained and quantised
in every forward pass; up is drawn with standard deviation 1e-3 cut at two of them, since a matrix
of zeros has no scale to quantise with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tuning.methods.adapter import attach_bottlenecks, check_bottleneck
from tuning.methods.method import Tuned
from tuning.quantizer import one_bit

if TYPE_CHECKING:
    from tuning.backbones import Backbone

UP_STD = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class OneBitAdapter:
    """AdaptFormer whose `down` and `up` are quantised to 1 bit a value in every pass."""

    name: ClassVar[str] = "one-bit-adapter"
    mean_is_exact: ClassVar[bool] = False

    width: int = 16
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_bottleneck(self.width, self.scale)

    def attach(self, backbone: Backbone, *, seed: int) -> Tuned:
        """Attach quantised bottlenecks."""
        return attach_bottlenecks(
            backbone, width=self.width, scale=self.scale, seed=seed, used=one_bit, up_std=UP_STD
        )
