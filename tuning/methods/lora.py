# SPDX-License-Identifier: Apache-2.0
"""LoRA, low-rank adaptation, through peft.

Source: Hu et al. 2022, arXiv 2106.09685: W = W0 + (alpha / rank) B A with B = 0 at the start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tuning.errors import MethodError
from tuning.methods.method import Tuned
from tuning.methods.peft_method import attach_peft

if TYPE_CHECKING:
    from tuning.backbones import Backbone


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRA:
    """Factors A [rank, in] and B [out, rank] at every target layer.

    The mean of A and of B is not the mean of B A (FedIT's error), hence `mean_is_exact` is False.
    """

    name: ClassVar[str] = "lora"
    mean_is_exact: ClassVar[bool] = False

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise MethodError(f"method.rank is {self.rank}; it must be at least 1")
        if not self.alpha > 0:
            raise MethodError(f"method.alpha is {self.alpha}; it must be above 0")

    def attach(self, backbone: Backbone, *, seed: int) -> Tuned:
        """Attach the factors: A drawn from `seed`, B zero."""
        settings = {"r": self.rank, "lora_alpha": self.alpha, "lora_dropout": 0.0}
        return attach_peft(backbone, "LORA", targets=self.targets, settings=settings, seed=seed)
