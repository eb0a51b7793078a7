# SPDX-License-Identifier: Apache-2.0
"""SFPrompt: a soft prompt and the tail of a network that a device holds both ends of.

Source: Cao, Zhu and Gong 2024, arXiv 2407.17533. Trained are the prompt and all of the tail; head
and body are frozen, and the body is the server's alone. This file says what is cut where; how the
parts are trained is `edge_runtime/split_trainer.py`'s business.

The published settings are not known to us, so the named cuts are ours: "faithful-minimal" keeps
the embeddings in front and the norm, a mean over the patches and the classifier behind;
"private" keeps two blocks more in front and one behind, and reads what the backbone reads.
Differs from source: a cut whose training without the body would learn nothing of the input (the
tail reads a token that has not seen the others yet) is refused.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Final

import torch
from torch import nn

from tuning.cuts import Cut, Pool, cut_network
from tuning.errors import MethodError
from tuning.methods.method import Tuned
from tuning.methods.prompt import PromptedEmbeddings, attach_prompt, widen_mask

if TYPE_CHECKING:
    from tuning.backbones import Backbone

FAITHFUL_MINIMAL: Final = "faithful-minimal"
PRIVATE: Final = "private"
_BLOCKS: Final = re.compile(r"([0-9]{1,3})\+([0-9]{1,3})")


class PatchMean(nn.Module):
    """The network's last norm, and the mean over its patches in the place of the class token.

    [B, T, D] -> [B, 1, D] of the last `patches` tokens; of fewer tokens, which have been pooled
    before, all are taken. With `first` the mean comes before the norm.
    """

    def __init__(self, base_layer: nn.Module, patches: int, *, first: bool) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.patches = patches
        self.first = first

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """See the class."""
        if self.first:
            normed: torch.Tensor = self.base_layer(self.mean(hidden))
            return normed
        return self.mean(self.base_layer(hidden))

    def mean(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, 1, D]."""
        return hidden[:, -self.patches :].mean(dim=1, keepdim=True)


class Unprompted(nn.Module):
    """Embeddings whose prompt is left out, under the names that they have with it."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, *inputs: torch.Tensor, **options: object) -> torch.Tensor:
        """[B, T, D]."""
        embedded: torch.Tensor = self.base_layer(*inputs, **options)
        return embedded

    @property
    def patch_embeddings(self) -> nn.Module:
        """ViT looks here for the data type that its images should have."""
        return self.base_layer.patch_embeddings


@dataclass(frozen=True, slots=True, kw_only=True)
class SFPrompt:
    """`length` prompt tokens, and a cut: a name, or blocks of the device as "2+1".

    With `pool` the server sends one token a sample back, the mean over the patches or the class
    token, where the tail reads nothing else.
    """

    name: ClassVar[str] = "sfprompt"
    mean_is_exact: ClassVar[bool] = False

    length: int = 10
    cut: str = PRIVATE
    pool: bool = False

    def __post_init__(self) -> None:
        if self.length < 1:
            raise MethodError(f"method.length is {self.length}; it must be at least 1")
        if self.cut not in (FAITHFUL_MINIMAL, PRIVATE) and not _BLOCKS.fullmatch(self.cut):
            raise MethodError(
                f'method.cut is "{self.cut}"; expected "{FAITHFUL_MINIMAL}", "{PRIVATE}" or the '
                'blocks that a device keeps in front and behind, as "2+1"'
            )
        if self.pool and self._cut.tail:
            raise MethodError(
                f'method.pool is true, but the tail of method.cut = "{self.cut}" has blocks that '
                "read every token; it must be false, or a cut with no block behind"
            )
        if self.cut != FAITHFUL_MINIMAL and not self._cut.head:
            raise MethodError(
                f'method.cut is "{self.cut}": without a block in front the tail would read a token '
                f'that has seen no input while the body is skipped; take "{FAITHFUL_MINIMAL}", '
                "which reads the mean of the patches, or a block in front"
            )

    @property
    def _cut(self) -> Cut:
        if self.cut == FAITHFUL_MINIMAL:
            return Cut(head=0, tail=0)
        if self.cut == PRIVATE:
            return Cut(head=2, tail=1)
        head, _, tail = self.cut.partition("+")
        return Cut(head=int(head), tail=int(tail))

    def attach(self, backbone: Backbone, *, seed: int) -> Tuned:
        """Put the prompt in, and cut. Raises: MethodError for a backbone that has no such cut."""
        prompt = attach_prompt(backbone, self.length, seed=seed)
        model, family = backbone.model, backbone.family
        assert family is not None, "attach_prompt refuses it"
        pool: Pool | None = None
        if self.cut == FAITHFUL_MINIMAL:
            reader = PatchMean(
                model.get_submodule(family.readout), _patches(backbone), first=self.pool
            )
            model.set_submodule(family.readout, reader)
            pool = reader.mean
        elif self.pool:
            if backbone.kind != "image":
                raise MethodError("method.pool is true; it must be false for texts")
            pool = _class_token
        parts = cut_network(
            model, family, backbone.classifier, self._cut, pool=pool if self.pool else None
        )
        shared = {id(value): value for value in (*model.parameters(), *model.buffers())}
        scoring = copy.deepcopy(parts.short, shared)
        prompted = scoring.get_submodule(family.embeddings)
        assert isinstance(prompted, PromptedEmbeddings)
        scoring.set_submodule(family.embeddings, Unprompted(prompted.base_layer))
        trained = dict(parts.tail.model.named_parameters())
        trainable = {name.replace("base_layer.", ""): name for name in trained}
        return Tuned(
            module=model,
            trainable={**trainable, prompt: prompt},
            prepare=partial(widen_mask, self.length),
            parts=replace(parts, scoring=scoring),
        )


def _class_token(hidden: torch.Tensor) -> torch.Tensor:
    return hidden[:, :1]


def _patches(backbone: Backbone) -> int:
    """Patches of an image. Raises: MethodError for a backbone that reads texts."""
    if backbone.kind != "image":
        raise MethodError(
            f'method.cut is "{FAITHFUL_MINIMAL}", which reads the mean of patches; it fits images '
            f'only: take "{PRIVATE}" for texts'
        )
    config = backbone.model.config
    return (int(config.image_size) // int(config.patch_size)) ** 2
