# SPDX-License-Identifier: Apache-2.0
"""Soft prompts: trained tokens that every input carries through the frozen network.

Source: visual prompt tuning, Jia et al. 2022, arXiv 2203.12119, section 3.2 ("shallow"): the
prompts enter after the class token and the position embedding, before the first block. The start
is uniform in +-sqrt(6 / (patch values + dim)), as the authors' code (KMnP/vpt) draws it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from tuning.backbones.patches import PatchProjection
from tuning.errors import MethodError
from tuning.methods.method import Batch, Tuned, classifier_parameters

if TYPE_CHECKING:
    from tuning.backbones import Backbone


class PromptedEmbeddings(nn.Module):
    """An embedding module whose output gets `prompt` [length, dim] after its first token."""

    def __init__(self, base_layer: nn.Module, prompt: torch.Tensor) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.prompt = nn.Parameter(prompt)

    # The two architectures call their embeddings with different keywords, all optional but one.
    def forward(self, *inputs: torch.Tensor, **options: object) -> torch.Tensor:
        """[B, T, D] -> [B, 1 + length + T - 1, D]."""
        embedded = self.base_layer(*inputs, **options)
        prompt = self.prompt.expand(embedded.shape[0], -1, -1)
        return torch.cat((embedded[:, :1], prompt, embedded[:, 1:]), dim=1)

    @property
    def patch_embeddings(self) -> nn.Module:
        """ViT looks here for the data type that its images should have."""
        return self.base_layer.patch_embeddings


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """`length` trained tokens."""

    name: ClassVar[str] = "prompt"
    mean_is_exact: ClassVar[bool] = False

    length: int = 10

    def __post_init__(self) -> None:
        if self.length < 1:
            raise MethodError(f"method.length is {self.length}; it must be at least 1")

    def attach(self, backbone: Backbone, *, seed: int) -> Tuned:
        """Wrap the embeddings, and widen the attention mask where the batch has one."""
        path = attach_prompt(backbone, self.length, seed=seed)
        trainable = classifier_parameters(backbone)
        trainable[path] = path
        return Tuned(
            module=backbone.model, trainable=trainable, prepare=partial(widen_mask, self.length)
        )


def attach_prompt(backbone: Backbone, length: int, *, seed: int) -> str:
    """Wrap the embeddings; the name of the prompt's parameter. Raises: MethodError."""
    family = backbone.family
    if family is None:
        raise MethodError(
            f"{type(backbone.model).__name__} is not an architecture whose embeddings are known; "
            "prompts fit ViT, BERT and LLaMA backbones"
        )
    dim = int(backbone.model.config.hidden_size)
    embeddings = backbone.model.get_submodule(family.embeddings)
    fan_in = dim
    for module in embeddings.modules():
        if isinstance(module, PatchProjection):
            fan_in = module.weight[0].numel()
    bound = math.sqrt(6.0 / (fan_in + dim))
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.empty(length, dim).uniform_(-bound, bound, generator=generator)
    backbone.model.set_submodule(family.embeddings, PromptedEmbeddings(embeddings, prompt))
    return f"{family.embeddings}.prompt"


def widen_mask(length: int, batch: Batch) -> Batch:
    """Prompts are always attended to: additive zeros after the first column."""
    if "attention_mask" not in batch:
        return batch
    mask = batch["attention_mask"]
    seen = mask.new_zeros((*mask.shape[:-1], length))
    widened = torch.cat((mask[..., :1], seen, mask[..., 1:]), dim=-1)
    return {**batch, "attention_mask": widened}
