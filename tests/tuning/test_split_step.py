# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from protocol.manifest import TrainingSpec
from tuning import split_step
from tuning.backbones import load_backbone
from tuning.methods import Tuned, method_named
from tuning.step import initial_state, training_step

Tensors = dict[str, torch.Tensor]
RATE = torch.tensor(0.05)


def tuned_of(folder: Path, **settings: Any) -> Tuned:
    backbone = load_backbone(folder, classes=3, seed=1, max_length=8)
    return method_named("sfprompt", {"length": 2, **settings}).attach(backbone, seed=1)


def batch_of(kind: str) -> Tensors:
    generator = torch.Generator().manual_seed(3)
    if kind == "image":
        return {"pixel_values": torch.randn(4, 1, 8, 8, generator=generator)}
    mask = torch.zeros(4, 1, 1, 8)
    mask[2, ..., 5:] = -10_000.0
    ids = torch.randint(4, 14, (4, 8), generator=generator)
    return {"input_ids": ids, "attention_mask": mask}


def split_training_step(
    tuned: Tuned,
    spec: TrainingSpec,
    tensors: Tensors,
    state: Tensors,
    batch: Tensors,
    labels: torch.Tensor,
    weight: torch.Tensor,
) -> tuple[Tensors, Tensors, torch.Tensor]:
    """Device and server in turns, as they work over the stream."""
    parts = split_step.parts_of(tuned)
    head, body, tail = (
        split_step.frozen_of(tuned, part) for part in (parts.head, parts.body, parts.tail)
    )
    front = {name: tensors[name] for name in split_step.of_part(tuned, parts.head)}
    behind = {name: tensors[name] for name in split_step.of_part(tuned, parts.tail)}
    assert {**front, **behind}.keys() == tensors.keys()
    wide = tuned.prepare(batch)
    masks = {name: value for name, value in wide.items() if name == "attention_mask"}

    entered = split_step.head_forward(tuned, front, head, batch)
    left = split_step.body_forward(tuned, body, entered, masks)
    new_tail, kept_tail, loss, at_left = split_step.tail_step(
        tuned, spec, behind, split_step.state_of(state, behind), tail, left, masks, labels,
        weight, RATE,
    )  # fmt: skip
    _, at_entered = split_step.body_there_and_back(tuned, body, entered, masks, at_left)
    new_prompt, kept_prompt = split_step.prompt_step(
        tuned, spec, front, split_step.state_of(state, front), head, batch, at_entered, RATE
    )
    return {**new_tail, **new_prompt}, {**kept_tail, **kept_prompt}, loss


@pytest.mark.parametrize("spec", [
    TrainingSpec(batch_size=4, optimizer="sgd", learning_rate=0.05, momentum=0.9),
    TrainingSpec(batch_size=4, optimizer="adamw", learning_rate=0.05, weight_decay=0.01),
], ids=lambda spec: spec.optimizer)  # fmt: skip
@pytest.mark.parametrize(("kind", "settings"), [
    ("image", {"cut": "faithful-minimal"}),
    ("image", {"cut": "faithful-minimal", "pool": True}),
    ("image", {"cut": "1+0"}),
    ("text", {"cut": "1+0"}),
    ("decoder", {"cut": "1+0"}),
], ids=str)  # fmt: skip
def test_pieces_after_one_another_are_the_step_of_the_whole(
    tiny_vit: Path,
    tiny_bert: Path,
    tiny_llama: Path,
    kind: str,
    settings: dict[str, Any],
    spec: TrainingSpec,
) -> None:
    folder = {"image": tiny_vit, "text": tiny_bert, "decoder": tiny_llama}[kind]
    tuned = tuned_of(folder, **settings)
    batch, labels = batch_of(kind), torch.tensor([0, 1, 2, 1])
    weight = torch.tensor([1.0, 1.0, 1.0, 0.0])  # a ragged batch
    whole = training_step(tuned, spec)
    frozen = tuned.frozen()
    expected = (tuned.parameters(), initial_state(tuned, spec), torch.zeros(()))
    found = expected
    for _ in range(3):
        expected = whole(expected[0], expected[1], frozen, batch, labels, weight, RATE)
        found = split_training_step(tuned, spec, found[0], found[1], batch, labels, weight)
        torch.testing.assert_close(found[2], expected[2], rtol=0, atol=1e-5)
        for one, other in zip(found[:2], expected[:2], strict=True):
            assert one.keys() == other.keys()
            for name in one:
                torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-5, msg=name)


def test_the_local_phase_trains_prompt_and_tail_without_the_body(tiny_vit: Path) -> None:
    tuned = tuned_of(tiny_vit, cut="1+0")
    spec = TrainingSpec(batch_size=4, optimizer="sgd", learning_rate=0.05)
    short = split_step.short_way(tuned)
    parts = split_step.parts_of(tuned)
    body = set(split_step.frozen_of(tuned, parts.body))
    assert not body & set(short.frozen())
    start = tuned.parameters()
    new, _, loss = training_step(short, spec)(
        start,
        {},
        short.frozen(),
        batch_of("image"),
        torch.tensor([0, 1, 2, 1]),
        torch.ones(4),
        RATE,
    )
    assert float(loss) > 0
    for name, value in start.items():
        assert not torch.equal(new[name], value), f"{name} has no gradient"


def test_el2n_is_the_length_of_the_error(tiny_vit: Path) -> None:
    tuned = tuned_of(tiny_vit, cut="1+0")
    parts = split_step.parts_of(tuned)
    behind = split_step.of_part(tuned, parts.tail)
    tensors = {name: value for name, value in tuned.parameters().items() if name in behind}
    batch, labels = batch_of("image"), torch.tensor([0, 1, 2, 1])
    frozen = split_step.short_way(tuned).frozen()
    found = split_step.el2n_scores(tuned, tensors, frozen, batch, labels)
    # The literal form, one sample after another.
    for row in range(4):
        with torch.no_grad():
            shares = torch.softmax(parts.scoring(batch["pixel_values"][row : row + 1]).logits, -1)[
                0
            ]
        errors = [float(share) - (place == int(labels[row])) for place, share in enumerate(shares)]
        assert float(found[row]) == pytest.approx(sum(e * e for e in errors) ** 0.5, abs=1e-6)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 2**0.5
