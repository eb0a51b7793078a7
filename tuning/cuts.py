# SPDX-License-Identifier: Apache-2.0
"""Cut a transformer into head, body and tail, of which a device keeps the two ends.

Source of the three parts: SFPrompt (Cao, Zhu and Gong 2024, arXiv 2407.17533) and U-shaped split
learning before it (Vepakomma et al. 2018, arXiv 1812.00564, figure 2b). The head is everything up
to the first `head` blocks, the tail the last `tail` blocks and everything behind them, the body
the blocks between. A part keeps the parameter names of the whole network, and its parameters
themselves: nothing is copied.

A cut is made by the network's own forward: blocks that belong to another part are taken out, the
embeddings of a part that begins later let its hidden states through, and a part that ends early
leaves from where its last block was. So masks, rotary positions and classifiers stay as their
authors wrote them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tuning.errors import MethodError

if TYPE_CHECKING:
    from tuning.backbones.families import Family

Pool = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Blocks that stay with the device, in front and behind; at least one is the server's."""

    head: int
    tail: int

    def check(self, blocks: int) -> None:
        """Raises: MethodError unless a network of so many blocks can be cut so."""
        if self.head < 0 or self.tail < 0 or self.head + self.tail >= blocks:
            raise MethodError(
                f"cannot cut {self.head} blocks in front and {self.tail} behind from a network of "
                f"{blocks}: expected 0 or more each, and a block or more between them"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The three parts, and the head with the tail put right behind it.

    `head` takes a batch by keyword and gives hidden states [B, T, D]; `body` takes and gives
    such; `tail` takes them and gives the network's answer. `short` is the network without its
    body, and `scoring` what scores samples: `short`, or that without what a method put before it.
    Body and tail take an `attention_mask` [B, 1, 1, T] as well, where there is one.
    """

    cut: Cut
    head: Part
    body: Part
    tail: Part
    short: nn.Module
    scoring: nn.Module


class Part(nn.Module):
    """A stretch of the network. Takes its inputs by keyword, `hidden` where it begins later."""

    def __init__(self, model: nn.Module, pool: Pool | None = None) -> None:
        super().__init__()
        self.model = model
        self.pool = pool

    def forward(self, hidden: torch.Tensor | None = None, **inputs: torch.Tensor) -> Any:
        """What comes out where the part ends."""
        if hidden is not None:
            inputs[entry_of(self.model)] = hidden
        try:
            return self.model(**inputs)
        except _Left as left:
            return left.hidden if self.pool is None else self.pool(left.hidden)

    def weights(self) -> dict[str, torch.Tensor]:
        """Parameters and saved buffers, by their names in the whole network."""
        return {
            name.removeprefix("model."): value.detach()
            for name, value in self.state_dict(keep_vars=True).items()
        }


class _Left(Exception):  # noqa: N818 - the way out of a forward pass, not a fault
    """Hidden states that leave the network early."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _Exit(nn.Module):
    def forward(self, hidden: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        raise _Left(hidden)


class _Entrance(nn.Module):
    """In the place of the embeddings: what enters is hidden states already."""

    def __init__(self) -> None:
        super().__init__()
        # ViT asks its patch embedding for the data type that its input should have.
        self.patch_embeddings = SimpleNamespace(projection=SimpleNamespace(weight=torch.zeros(0)))

    def forward(self, *hidden: torch.Tensor, **named: object) -> object:
        return hidden[0] if hidden else named["input_ids"]


class _Skipped(nn.Module):
    """In the place of a block of another part, so that the others keep their numbers."""

    def forward(self, hidden: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return hidden


def entry_of(model: nn.Module) -> str:
    """The keyword of what enters a network first."""
    return "pixel_values" if hasattr(model.config, "image_size") else "input_ids"


def block_count(model: nn.Module, family: Family) -> int:
    """Blocks of the whole network."""
    return len(list(model.get_submodule(family.blocks).children()))


def cut_network(
    model: nn.Module, family: Family, classifier: str, cut: Cut, *, pool: Pool | None = None
) -> Parts:
    """The parts of a network, whose classification layer is at the path `classifier`.

    `pool` is what happens to hidden states before they leave the body.

    Raises: MethodError for a cut that the network does not have.
    """
    count = block_count(model, family)
    cut.check(count)
    behind = count - cut.tail

    def made(*kept: range, enters: bool = False, leaves: int | None = None) -> nn.Module:
        # The same weights once more, not a copy of them.
        shared = {id(value): value for value in (*model.parameters(), *model.buffers())}
        part = copy.deepcopy(model, shared)
        blocks = part.get_submodule(family.blocks)
        for index in range(count):
            if not any(index in indices for indices in kept):
                blocks.set_submodule(str(index), _Skipped())
        if leaves is not None:
            part.set_submodule(family.readout, _Exit())
            part.set_submodule(classifier, nn.Identity())
            if leaves < count:
                blocks.set_submodule(str(leaves), _Exit())
        if enters:
            part.set_submodule(family.embeddings, _Entrance())
        return part

    front, middle, end = range(cut.head), range(cut.head, behind), range(behind, count)
    short = made(front, end)
    return Parts(
        cut=cut,
        head=Part(made(front, leaves=cut.head)),
        body=Part(made(middle, enters=True, leaves=behind), pool),
        tail=Part(made(end, enters=True)),
        short=short,
        scoring=short,
    )
