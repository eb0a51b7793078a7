# SPDX-License-Identifier: Apache-2.0
"""What a split network costs a device: operations and bytes on ViT-B/16 and ViT-L/16, by formula.

The formulas of operations are held to torch's counter in tests/tuning/test_flops.py; bytes are
those of the messages that a stream carries, headers included. Nothing is trained here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from protocol.activations import encoded_bytes
from protocol.split import SplitSpec
from protocol.stream import States, pack_message
from simulations.benchmarks.figure import Figure, figure
from tuning.flop_formulas import ViTShape

VIT_B: Final = ViTShape(blocks=12, width=768, inner=3072, patches=196, patch_values=768, classes=10)
VIT_L: Final = replace(VIT_B, blocks=24, width=1024, inner=4096)
PROMPTS: Final = 5
FLOAT_BYTES: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """A client's round of SFPrompt with the faithful cut: so many samples kept, one pass."""

    shape: ViTShape
    kept: int
    batch: int = 32
    pooled: bool = False

    @property
    def spec(self) -> SplitSpec:
        """What crosses the cut."""
        tokens = self.shape.tokens
        return SplitSpec(
            entering_tokens=tokens,
            leaving_tokens=1 if self.pooled else tokens,
            width=self.shape.width,
        )

    def stream_bytes(self) -> int:
        """Of all four messages of every batch."""
        spec = self.spec
        sizes = [self.batch] * (self.kept // self.batch)
        if rest := self.kept % self.batch:
            sizes.append(rest)
        total = 0
        for number, rows in enumerate(sizes, start=1):
            for kind, each in (
                ("forward", spec.entering),
                ("left", spec.leaving),
                ("backward", spec.leaving),
                ("entered", spec.entering),
            ):
                header = States(kind=kind, number=2 * number, rows=rows)  # type: ignore[arg-type]
                total += len(pack_message(header)) + encoded_bytes(each, rows, spec.form)
        return total

    def total_bytes(self) -> int:
        """With prompt and tail, to the client and back, as float32."""
        shape = self.shape
        norm, classifier = 2 * shape.width, (shape.width + 1) * shape.classes
        trained = shape.prompts * shape.width + norm + classifier
        return self.stream_bytes() + 2 * FLOAT_BYTES * trained


def parameters(shape: ViTShape) -> int:
    """Weights of the whole network, which federated full fine-tuning sends both ways."""
    width, inner = shape.width, shape.inner
    block = 4 * width * (width + 1) + 2 * width * inner + inner + width + 4 * width
    tokens = shape.patches + 1
    embedding = (shape.patch_values + 1) * width + width + tokens * width
    return embedding + shape.blocks * block + 2 * width + (width + 1) * shape.classes


def break_even(shape: ViTShape) -> int:
    """Samples a client and round above which SFPrompt sends more than full fine-tuning.

    Of 1,000 classes and without prompts, as published counts are.
    """
    whole = parameters(replace(shape, classes=1000))
    return whole // (2 * shape.tokens * shape.width)


def device_flops_share(shape: ViTShape = VIT_B) -> Figure:
    """`device_flops_share`: a device's part of a step through the body, of a full step, percent."""
    prompted = replace(shape, prompts=PROMPTS)
    full = shape.full_step()
    split, local = prompted.split_step(0, 0), prompted.local_step(0, 0)
    private = prompted.split_step(2, 1)
    return figure(
        "device_flops_share",
        100 * split / full,
        unit="%",
        target="<= 0.46",
        note=f"ViT-B/16 at 224: {split / 1e6:.0f} of {full / 1e6:.0f} MFLOP a sample: the patch "
        f"embedding forward ({shape.embedding / 1e6:.0f}) and the classifier both ways, of "
        "2 embeddings, 3 x 12 blocks and 3 classifiers; apart from it a score costs "
        f"{100 * shape.score(0, 0) / full:.2f} %, a local step {100 * local / full:.2f} %; the "
        f"private cut {100 * private / full:.1f} %",
    )


def traffic_share(pooled: bool = False) -> Figure:
    """`traffic_share` or `traffic_share_pooled`: bytes of a client's round, of full fine-tuning."""
    base = Round(shape=replace(VIT_B, prompts=PROMPTS), kept=134, pooled=pooled)
    share = base.total_bytes() / (2 * FLOAT_BYTES * parameters(VIT_B))
    if pooled:
        return figure(
            "traffic_share_pooled",
            share,
            target="<= 0.25",
            note=f"ViT-B/16, 134 samples, {PROMPTS} prompt tokens, one token a sample back",
        )
    large = Round(shape=replace(VIT_L, prompts=PROMPTS), kept=143)
    large_share = large.total_bytes() / (2 * FLOAT_BYTES * parameters(VIT_L))
    made = figure(
        "traffic_share",
        share,
        target="<= 0.485",
        note=f"ViT-B/16, 134 samples, {PROMPTS} prompt tokens, weights and headers included: "
        f"{base.total_bytes() / 1e6:.1f} MB; ViT-L/16, 143 samples: {large_share:.3f} (at most "
        f"0.20); without prompts even at {break_even(VIT_B)} and {break_even(VIT_L)} samples",
    )
    return replace(made, holds=bool(made.holds) and large_share <= 0.20)
