# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tuning.backbones import load_backbone
from tuning.methods import method_named


def test_start_is_uniform_within_the_bound_of_vpt(tiny_vit: Path) -> None:
    tuned = method_named("prompt", {"length": 40}).attach(
        load_backbone(tiny_vit, classes=4, seed=1), seed=1
    )
    prompt = tuned.parameters()["vit.embeddings.prompt"]
    assert prompt.shape == (40, 16)
    bound = math.sqrt(6 / (1 * 4 * 4 + 16))
    assert 0.97 * bound < float(prompt.abs().max()) <= bound
    assert float(prompt.std()) == pytest.approx(bound / math.sqrt(3), rel=0.08)


def test_prompts_stand_after_the_class_token(tiny_vit: Path) -> None:
    plain = load_backbone(tiny_vit, classes=4, seed=1).model
    tuned = method_named("prompt", {"length": 3}).attach(
        load_backbone(tiny_vit, classes=4, seed=1), seed=1
    )
    prompt = tuned.parameters()["vit.embeddings.prompt"]
    pixels = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    entered: list[torch.Tensor] = []
    tuned.module.get_submodule("vit.layers.0").register_forward_pre_hook(
        lambda module, inputs: entered.append(inputs[0])
    )
    # The literal form: a hook that puts them into the output of the plain embeddings.
    plain.get_submodule("vit.embeddings").register_forward_hook(
        lambda module, inputs, out: torch.cat(
            [out[:, :1], prompt.repeat(2, 1, 1), out[:, 1:]], dim=1
        )
    )
    with torch.no_grad():
        found, expected = tuned.module(pixels).logits, plain(pixels).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    (tokens,) = entered
    assert tokens.shape == (2, 1 + 3 + 4, 16)
    assert torch.equal(tokens[0, 1:4], prompt)


def test_mask_is_widened_so_that_prompts_are_seen(tiny_bert: Path) -> None:
    tuned = method_named("prompt", {"length": 3}).attach(
        load_backbone(tiny_bert, classes=4, seed=1, max_length=8), seed=1
    )
    mask = torch.full((2, 1, 1, 8), -10000.0)
    mask[..., :2] = 0
    ids = torch.zeros(2, 8, dtype=torch.int64)
    prepared = tuned.prepare({"input_ids": ids, "attention_mask": mask})
    wide = prepared["attention_mask"]
    assert wide.shape == (2, 1, 1, 11)
    assert (wide[..., :5] == 0).all() and (wide[..., 5:] == -10000.0).all()
    assert mask.shape[-1] == 8, "the batch itself was changed"
    with torch.no_grad():
        scores = tuned.module(**prepared).logits
        other = dict(prepared) | {"input_ids": ids.clone()}
        other["input_ids"][:, 5:] = 7  # behind the mask
        torch.testing.assert_close(tuned.module(**other).logits, scores, rtol=0, atol=1e-6)


def test_batch_without_a_mask_stays(tiny_vit: Path) -> None:
    tuned = method_named("prompt", {}).attach(load_backbone(tiny_vit, classes=4, seed=1), seed=1)
    batch = {"pixel_values": torch.zeros(1, 1, 8, 8)}
    assert tuned.prepare(batch) is batch
