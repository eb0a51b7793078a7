# SPDX-License-Identifier: Apache-2.0
"""LoRA-SB: a trained core between two frozen factors, on query and value.

*Source* Ponkshe et al., "Initialization using Update Approximation is a Silver Bullet for Extremely
Efficient Low-Rank Fine-Tuning" (arXiv 2411.19557), and for many clients Singhal et al., "Fed-SB: A
Silver Bullet for Extreme Communication Efficiency and Performance in (Private) Federated LoRA
Fine-Tuning" (arXiv 2502.15436): W = W0 + s·B·R·A, of which the core R [r, r] alone is trained. B
and A are the same for all clients, so that the mean of the cores is the mean of the networks'
changes: r² values a layer travel, and the weighted mean is all that the server needs.
*Differs from source* LoRA-SB takes B, A and the first R from the truncated SVD of the update that
full fine-tuning would make first, from its gradient on some of the training data. A bundle is
compiled before any client's data is seen. So the SVD is that of the pre-trained weight, as in
LoRA-XS (Bałazy et al., arXiv 2405.17604): W0 ≈ U_r S_r V_rᵀ, B = U_r and A = V_rᵀ. Results are
those of this variant: the factors span what the backbone does most, not what the task asks for.
LoRA-XS multiplies S_r into a factor and draws R with a deviation of 1e-5. Here S_r is left out, as
it is from the factors of LoRA-SB: orthonormal factors make the gradient of R that of the full
weight, projected, s·Bᵀ·G·Aᵀ, so that with s = 1 a step of SGD is the projection of the step that
full fine-tuning takes at the same rate. Singular values would scale directions by their squares.
R is 0: the network starts as the backbone, and weight decay pulls back to it.
*Cost* one SVD a layer when a job is compiled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from tuning.errors import MethodError
from tuning.methods.method import Tuned, classifier_parameters, query_and_value

if TYPE_CHECKING:
    from tuning.backbones import Backbone


class CoreLowRank(nn.Module):
    """A linear layer plus scale * up(core(down(x))), of which `core` alone is trained."""

    # Buffers, not parameters: saved with the backbone's weights, and out of every optimizer's way.
    down: torch.Tensor
    up: torch.Tensor

    def __init__(self, base_layer: nn.Linear, *, rank: int, scale: float) -> None:
        super().__init__()
        self.base_layer = base_layer
        up, down = leading_directions(base_layer.weight.detach(), rank)
        self.register_buffer("down", down)
        self.register_buffer("up", up)
        self.core = nn.Parameter(torch.zeros(rank, rank))
        self.scale = scale

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        inner = nn.functional.linear(nn.functional.linear(hidden, self.down), self.core)
        return self.base_layer(hidden) + self.scale * nn.functional.linear(inner, self.up)

    def folded(self) -> nn.Module:
        """The layer with the product merged into its weight."""
        layer = self.base_layer
        with torch.no_grad():
            product = self.up @ self.core @ self.down
            layer.weight = nn.Parameter(layer.weight + self.scale * product, requires_grad=False)
        return layer


def leading_directions(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first singular vectors of [d, k], orthonormal: U_r [d, r] and V_rᵀ [r, k].

    A singular vector's sign is anyone's choice: here the largest magnitude in each of U's columns
    is positive.
    """
    left, _, right = torch.linalg.svd(weight.double(), full_matrices=False)
    left, right = left[:, :rank], right[:rank]
    largest = left.gather(0, left.abs().argmax(dim=0, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0)
    up, down = left * signs, right * signs.T
    return up.to(weight.dtype).contiguous(), down.to(weight.dtype).contiguous()


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRASB:
    """Cores [rank, rank] on the query and value projections."""

    name: ClassVar[str] = "lora-sb"
    mean_is_exact: ClassVar[bool] = True

    rank: int = 8
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise MethodError(f"method.rank is {self.rank}; it must be at least 1")
        if not self.scale > 0:
            raise MethodError(f"method.scale is {self.scale}; it must be above 0")

    def attach(self, backbone: Backbone, *, seed: int) -> Tuned:
        """Wrap the query and value projection of every block. Nothing is drawn from `seed`."""
        trainable = classifier_parameters(backbone)
        for name, base in query_and_value(backbone, "LoRA-SB"):
            most = min(base.weight.shape)
            if self.rank > most:
                raise MethodError(
                    f"method.rank: expected at most {most}, the smaller side of {name} "
                    f"{list(base.weight.shape)}, found {self.rank}"
                )
            backbone.model.set_submodule(name, CoreLowRank(base, rank=self.rank, scale=self.scale))
            trainable[f"{name}.core"] = f"{name}.core"
        return Tuned(module=backbone.model, trainable=trainable, fold=fold_cores)


def fold_cores(module: nn.Module) -> nn.Module:
    """Merge every core with its factors into the layer that it stands beside."""
    for path, layer in list(module.named_modules()):
        if isinstance(layer, CoreLowRank):
            module.set_submodule(path, layer.folded())
    return module
