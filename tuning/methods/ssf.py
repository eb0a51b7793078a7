# SPDX-License-Identifier: Apache-2.0
"""SSF: scale and shift the features of every layer.

Source: Lian et al. 2022, arXiv 2210.08823, section 3: y = gamma * h + beta after the patch
embedding, every normalisation and every linear layer, and nothing but the classifier beside it.

Differs from source: gamma is stored as 1 + `scale`, so that a tensor of zeros means "no change".
Weight decay then pulls towards the pre-trained network, and deltas are centred at zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from tuning.backbones.patches import PatchProjection
from tuning.errors import MethodError
from tuning.methods.method import Tuned, classifier_parameters

if TYPE_CHECKING:
    from tuning.backbones import Backbone


class ScaleShift(nn.Module):
    """A layer followed by y = (1 + scale) * h + shift over its output channels."""

    def __init__(self, base_layer: nn.Module, channels: int, channel_axis: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.scale = nn.Parameter(torch.zeros(channels))
        self.shift = nn.Parameter(torch.zeros(channels))
        # [channels] against [..., channels] needs nothing; [B, channels, H, W] two more axes.
        self.trailing = (1,) * (-1 - channel_axis)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the layer, then the affine map."""
        shape = (-1, *self.trailing)
        scale, shift = self.scale.reshape(shape), self.shift.reshape(shape)
        return self.base_layer(hidden) * (1.0 + scale) + shift

    @property
    def weight(self) -> torch.Tensor:
        """The layer's own weight: some networks ask their first layer for its data type."""
        return self.base_layer.weight

    def folded(self) -> nn.Module:
        """The layer alone, with scale and shift merged into its weight and bias."""
        layer = self.base_layer
        weight, bias = layer.weight, layer.bias
        gamma = 1.0 + self.scale
        with torch.no_grad():
            axes = (1,) * (weight.dim() - 1)
            layer.weight = nn.Parameter(weight * gamma.reshape(-1, *axes), requires_grad=False)
            old = torch.zeros_like(self.shift) if bias is None else bias
            layer.bias = nn.Parameter(old * gamma + self.shift, requires_grad=False)
        return layer


@dataclass(frozen=True, slots=True, kw_only=True)
class SSF:
    """Scale and shift at every site. `init_std` is the paper's 0.02 for both."""

    name: ClassVar[str] = "ssf"
    mean_is_exact: ClassVar[bool] = False

    init_std: float = 0.02

    def __post_init__(self) -> None:
        if not 0 <= self.init_std < 1:
            raise MethodError(f"method.init_std is {self.init_std}; it must be in [0, 1)")

    def attach(self, backbone: Backbone, *, seed: int) -> Tuned:
        """Wrap every linear, normalisation and patch embedding layer but the classifier."""
        model = backbone.model
        trainable = classifier_parameters(backbone)
        generator = torch.Generator().manual_seed(seed)
        for path, module, place in sites(model):
            if path == backbone.classifier or path.startswith(backbone.classifier + "."):
                continue
            wrapped = ScaleShift(module, *place)
            with torch.no_grad():
                wrapped.scale.normal_(0.0, self.init_std, generator=generator)
                wrapped.shift.normal_(0.0, self.init_std, generator=generator)
            model.set_submodule(path, wrapped)
            for name in ("scale", "shift"):
                trainable[f"{path}.{name}"] = f"{path}.{name}"
        return Tuned(module=model, trainable=trainable, fold=fold_scales)


def sites(model: nn.Module) -> list[tuple[str, nn.Module, tuple[int, int]]]:
    """Every layer that SSF follows, with its path, output channels and their axis."""
    return [
        (path, module, place)
        for path, module in model.named_modules()
        if (place := _site(module)) is not None
    ]


def _site(module: nn.Module) -> tuple[int, int] | None:
    """Output channels and their axis, where the module is a site of scale and shift."""
    if isinstance(module, nn.Linear):
        return module.out_features, -1
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[0], -1
    if isinstance(module, PatchProjection):
        return module.out_channels, -3
    return None


def fold_scales(module: nn.Module) -> nn.Module:
    """Merge every scale and shift into the layer before it (exact, arXiv 2210.08823, eq. 4)."""
    for path, layer in list(module.named_modules()):
        if isinstance(layer, ScaleShift):
            module.set_submodule(path, layer.folded())
    return module
