# SPDX-License-Identifier: Apache-2.0
"""AdaptFormer: a small bottleneck parallel to the feed-forward part of every block.

Source: Chen et al. 2022, arXiv 2205.13535, in the form of Jie et al. 2023, arXiv 2307.16867
(`binary_adapter`): out += scale * up(relu(down(x))), without biases, where x is the residual
stream before its normalisation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from tuning.errors import MethodError
from tuning.methods.method import Tuned, classifier_parameters

if TYPE_CHECKING:
    from tuning.backbones import Backbone

WeightMap = Callable[[torch.Tensor], torch.Tensor]


def used_as_stored(weight: torch.Tensor) -> torch.Tensor:
    """The weight map of a full-precision adapter."""
    return weight


class Tap(nn.Module):
    """Remembers the input of a layer for the adapter that runs later in the same pass."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.seen: torch.Tensor | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Pass through, keeping the input."""
        self.seen = hidden
        return self.base_layer(hidden)


class ParallelBottleneck(nn.Module):
    """Adds a bottleneck of the tapped residual stream to the output of a layer."""

    def __init__(
        self,
        base_layer: nn.Module,
        tap: Tap,
        *,
        width: int,
        dim: int,
        scale: float,
        used: WeightMap,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.down = nn.Parameter(torch.empty(width, dim))
        self.up = nn.Parameter(torch.empty(dim, width))
        self.scale = scale
        self.used = used
        # In a tuple, so that the tap stays a child of the place it wraps and of no other.
        self.tap = (tap,)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The layer's output plus scale * up(relu(down(residual)))."""
        residual = self.tap[0].seen
        if residual is None:
            raise RuntimeError("the adapter ran before the layer whose input it reads")
        # Dropped at once: it would keep a batch, or a tracer's stand-in, alive between passes.
        self.tap[0].seen = None
        inner = nn.functional.relu(nn.functional.linear(residual, self.used(self.down)))
        return self.base_layer(hidden) + self.scale * nn.functional.linear(
            inner, self.used(self.up)
        )


def attach_bottlenecks(
    backbone: Backbone, *, width: int, scale: float, seed: int, used: WeightMap, up_std: float
) -> Tuned:
    """Put a bottleneck beside the feed-forward part of every block.

    Raises:
        MethodError: the architecture's blocks are not known.
    """
    family = backbone.family
    if family is None:
        raise MethodError(
            f"{type(backbone.model).__name__} is not an architecture whose blocks are known; "
            "adapters fit ViT, BERT and LLaMA backbones; LoRA with method.targets fits any"
        )
    generator = torch.Generator().manual_seed(seed)
    trainable = classifier_parameters(backbone)
    blocks = backbone.model.get_submodule(family.blocks)
    for index, block in enumerate(blocks.children()):
        tap = Tap(block.get_submodule(family.ffn_input))
        _replace(block, family.ffn_input, tap)
        last = block.get_submodule(family.ffn_output)
        bottleneck = ParallelBottleneck(
            last, tap, width=width, dim=int(last.out_features), scale=scale, used=used
        )
        nn.init.xavier_uniform_(bottleneck.down, generator=generator)
        with torch.no_grad():
            if up_std:
                nn.init.trunc_normal_(
                    bottleneck.up, std=up_std, a=-2 * up_std, b=2 * up_std, generator=generator
                )
            else:
                bottleneck.up.zero_()
        _replace(block, family.ffn_output, bottleneck)
        for name in ("down", "up"):
            path = f"{family.blocks}.{index}.{family.ffn_output}.{name}"
            trainable[path] = path
    return Tuned(module=backbone.model, trainable=trainable)


def _replace(block: nn.Module, path: str, module: nn.Module) -> None:
    block.set_submodule(path, module)


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """AdaptFormer with `width` hidden units; up starts at zero, so the network starts unchanged."""

    name: ClassVar[str] = "adapter"
    mean_is_exact: ClassVar[bool] = False

    width: int = 16
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_bottleneck(self.width, self.scale)

    def attach(self, backbone: Backbone, *, seed: int) -> Tuned:
        """Attach full-precision bottlenecks."""
        return attach_bottlenecks(
            backbone,
            width=self.width,
            scale=self.scale,
            seed=seed,
            used=used_as_stored,
            up_std=0.0,
        )


def check_bottleneck(width: int, scale: float) -> None:
    """Refuse a width or scale that makes no adapter."""
    if width < 1:
        raise MethodError(f"method.width is {width}; it must be at least 1")
    if not scale > 0:
        raise MethodError(f"method.scale is {scale}; it must be above 0")
