# SPDX-License-Identifier: Apache-2.0
"""Floating point operations of a training step, by formula.

Matrix products and attention only, 2 a multiply-add; the optimizer and everything elementwise are
left out, as is usual.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFlops:
    """A device's operations on one batch, where a server holds the body."""

    through: int
    """Its part of a step through the body."""
    local: int
    """A step with the body skipped."""
    scores: int
    """EL2N of the batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ViTShape:
    """What the operations of a vision transformer depend on, a sample.

    ViT-B/16 at 224 pixels: 12 blocks of width 768, 3072 in the feed-forward part, 196 patches of
    768 values, one more token for the class.
    """

    blocks: int
    width: int
    inner: int
    patches: int
    patch_values: int
    classes: int
    prompts: int = 0

    @property
    def tokens(self) -> int:
        """Patches, the class token and prompts."""
        return self.patches + 1 + self.prompts

    @property
    def embedding(self) -> int:
        """Forward through the patch embedding."""
        return 2 * self.patches * self.patch_values * self.width

    @property
    def linear(self) -> int:
        """Forward through a block's six layers of weights."""
        return 2 * self.tokens * self.width * (4 * self.width + 2 * self.inner)

    @property
    def attention(self) -> int:
        """Forward through a block's scores, and through the mixing by them."""
        return 4 * self.tokens * self.tokens * self.width

    @property
    def block(self) -> int:
        """Forward through one block."""
        return self.linear + self.attention

    @property
    def way_back(self) -> int:
        """Back through a frozen block: no gradient of weights, but of both sides of attention."""
        return self.linear + 2 * self.attention

    @property
    def classifier(self) -> int:
        """Forward through the last layer, of one token."""
        return 2 * self.width * self.classes

    def full_step(self) -> int:
        """Forward and backward of full fine-tuning; no gradient is asked of the image."""
        return 2 * self.embedding + 3 * (self.blocks * self.block + self.classifier)

    def split_step(self, head: int, tail: int) -> int:
        """A device's part of a step through the body, with so many blocks in front and behind.

        The frozen head goes forward once, and with blocks in front forward again and back to the
        prompt, without gradients of weights; the tail is trained.
        """
        front = self.embedding + head * self.block
        if head:
            # The graph of the prompt's step goes there again before it comes back.
            front += self.embedding + head * (self.block + self.way_back)
        return front + 3 * (tail * self.block + self.classifier)

    def local_step(self, head: int, tail: int) -> int:
        """A step with the body skipped: forward, and back to the prompt where it is read."""
        front = self.embedding + head * (self.block + self.way_back)
        return front + 3 * (tail * self.block + self.classifier)

    def score(self, head: int, tail: int) -> int:
        """An EL2N score: forward with the body skipped, without prompts."""
        bare = replace(self, prompts=0)
        return bare.embedding + (head + tail) * bare.block + bare.classifier
