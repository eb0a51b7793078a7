# SPDX-License-Identifier: Apache-2.0
"""1-bit LoRA (Bi-LoRA): low-rank factors on query and value, used as 1-bit values.

Source: Jie, Wang and Deng 2023, arXiv 2307.16867: out += scale * up(down(x)) on the query and value
projections, both matrices quantised in every forward pass, gradients straight through.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from tuning.errors import MethodError
from tuning.methods.method import Tuned, classifier_parameters, query_and_value
from tuning.methods.one_bit_adapter import UP_STD
from tuning.quantizer import one_bit

if TYPE_CHECKING:
    from tuning.backbones import Backbone


class OneBitLowRank(nn.Module):
    """A linear layer plus scale * up(down(x)) with 1-bit factors."""

    def __init__(self, base_layer: nn.Linear, *, rank: int, scale: float) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.down = nn.Parameter(torch.empty(rank, base_layer.in_features))
        self.up = nn.Parameter(torch.empty(base_layer.out_features, rank))
        self.scale = scale

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        inner = nn.functional.linear(hidden, one_bit(self.down))
        return self.base_layer(hidden) + self.scale * nn.functional.linear(inner, one_bit(self.up))

    def folded(self) -> nn.Module:
        """The layer with the quantised product merged into its weight."""
        layer = self.base_layer
        with torch.no_grad():
            product = one_bit(self.up) @ one_bit(self.down)
            layer.weight = nn.Parameter(layer.weight + self.scale * product, requires_grad=False)
        return layer


@dataclass(frozen=True, slots=True, kw_only=True)
class OneBitLoRA:
    """1-bit factors of `rank` on the query and value projections."""

    name: ClassVar[str] = "one-bit-lora"
    mean_is_exact: ClassVar[bool] = False

    rank: int = 8
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise MethodError(f"method.rank is {self.rank}; it must be at least 1")
        if not self.scale > 0:
            raise MethodError(f"method.scale is {self.scale}; it must be above 0")

    def attach(self, backbone: Backbone, *, seed: int) -> Tuned:
        """Wrap the query and value projection of every block."""
        generator = torch.Generator().manual_seed(seed)
        trainable = classifier_parameters(backbone)
        for name, base in query_and_value(backbone, "1-bit LoRA"):
            layer = OneBitLowRank(base, rank=self.rank, scale=self.scale)
            nn.init.xavier_uniform_(layer.down, generator=generator)
            nn.init.trunc_normal_(
                layer.up, std=UP_STD, a=-2 * UP_STD, b=2 * UP_STD, generator=generator
            )
            backbone.model.set_submodule(name, layer)
            trainable |= {f"{name}.{part}": f"{name}.{part}" for part in ("down", "up")}
        return Tuned(module=backbone.model, trainable=trainable, fold=fold_low_rank)


def fold_low_rank(module: nn.Module) -> nn.Module:
    """Merge every 1-bit product into the layer that it stands beside."""
    for path, layer in list(module.named_modules()):
        if isinstance(layer, OneBitLowRank):
            module.set_submodule(path, layer.folded())
    return module
