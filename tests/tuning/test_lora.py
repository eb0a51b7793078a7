# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tuning.backbones import load_backbone
from tuning.methods import method_named


def pixels() -> torch.Tensor:
    return torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_network_starts_unchanged(tiny_vit: Path) -> None:
    plain = load_backbone(tiny_vit, classes=4, seed=1).model
    tuned = method_named("lora", {"rank": 2}).attach(
        load_backbone(tiny_vit, classes=4, seed=1), seed=1
    )
    with torch.no_grad():
        assert torch.equal(tuned.module(pixels()).logits, plain(pixels()).logits)
    for name, value in tuned.parameters().items():
        assert bool((value == 0).all()) is (name.endswith("lora_B.weight") or name == (
            "classifier.bias"
        )), name  # fmt: skip


def test_factors_stand_at_query_and_value_by_default(tiny_vit: Path) -> None:
    tuned = method_named("lora", {"rank": 3}).attach(
        load_backbone(tiny_vit, classes=4, seed=1), seed=1
    )
    shapes = {name: tuple(value.shape) for name, value in tuned.parameters().items()}
    expected = {"classifier.weight": (4, 16), "classifier.bias": (4,)}
    for block in (0, 1):
        for layer in ("q_proj", "v_proj"):
            path = f"vit.layers.{block}.attention.{layer}"
            expected[f"{path}.lora_A.weight"] = (3, 16)
            expected[f"{path}.lora_B.weight"] = (16, 3)
    assert shapes == expected


def test_targets_choose_other_layers(tiny_bert: Path) -> None:
    tuned = method_named("lora", {"targets": ["intermediate.dense"]}).attach(
        load_backbone(tiny_bert, classes=4, seed=1, max_length=8), seed=1
    )
    layers = {name.split(".lora_")[0] for name in tuned.parameters() if "lora_" in name}
    assert layers == {f"bert.encoder.layer.{block}.intermediate.dense" for block in (0, 1)}


def test_weight_changes_by_alpha_over_rank_times_b_a(tiny_vit: Path) -> None:
    plain = load_backbone(tiny_vit, classes=4, seed=1).model
    tuned = method_named("lora", {"rank": 2, "alpha": 6.0}).attach(
        load_backbone(tiny_vit, classes=4, seed=1), seed=1
    )
    tensors, inside = tuned.parameters(), dict(tuned.module.named_parameters())
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, value in tensors.items():
            if name.endswith("lora_B.weight"):
                b = torch.randn(value.shape, generator=generator)
                inside[tuned.trainable[name]].copy_(b)
                path = name.removesuffix(".lora_B.weight")
                plain.get_submodule(path).weight += 6.0 / 2 * b @ tensors[f"{path}.lora_A.weight"]
        found, expected = tuned.module(pixels()).logits, plain(pixels()).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_targets_that_are_nowhere_are_refused(tiny_vit: Path) -> None:
    from tuning.errors import MethodError

    with pytest.raises(MethodError, match=r"target modules \['nowhere'\]"):
        method_named("lora", {"targets": ["nowhere"]}).attach(
            load_backbone(tiny_vit, classes=4, seed=1), seed=1
        )
