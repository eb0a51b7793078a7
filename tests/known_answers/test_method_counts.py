# SPDX-License-Identifier: Apache-2.0
"""Published parameter counts on ViT-B/16, on torch's meta device: shapes without memory."""

from __future__ import annotations

from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch

from tuning.backbones import load_backbone
from tuning.methods import method_named
from tuning.quantizer import CODE


@pytest.fixture(scope="module")
def vit_b_16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import ViTConfig

    folder = tmp_path_factory.mktemp("models") / "vit-b-16"
    config = ViTConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.patch_size) == (768, 12, 16)
    config.save_pretrained(folder)
    return folder


def added(folder: Path, name: str, settings: dict[str, Any], classes: int) -> tuple[int, int]:
    """Trained values without and with the classifier."""
    with torch.device("meta"):
        backbone = load_backbone(folder, classes=classes, seed=0, random_weights=True)
        tensors = method_named(name, settings).attach(backbone, seed=0).parameters()
    head = sum(v.numel() for n, v in tensors.items() if n.startswith("classifier"))
    every = sum(value.numel() for value in tensors.values())
    return every - head, every


def test_ssf_has_the_count_of_the_paper(vit_b_16: Path) -> None:
    # 2·(768 + 12·11·768 + 768): the patch embedding, eleven widths a block, the last norm
    assert added(vit_b_16, "ssf", {}, 100) == (205_824, 282_724)


def test_ssf_with_the_imagenet_head_too(vit_b_16: Path) -> None:
    assert added(vit_b_16, "ssf", {}, 1000)[1] == 974_824


def test_bi_adaptformer_has_the_count_that_its_73_920_bytes_hold(vit_b_16: Path) -> None:
    values, _ = added(vit_b_16, "one-bit-adapter", {"width": 32}, 100)
    assert values // 8 + 24 * 8 == 73_920


def test_bi_lora_has_the_count_that_its_147_840_bytes_hold(vit_b_16: Path) -> None:
    values, _ = added(vit_b_16, "one-bit-lora", {"rank": 32}, 100)
    assert values // 8 + 48 * 8 == 147_840


def test_lora_sb_has_r_squared_values_a_layer(vit_b_16: Path) -> None:
    # two layers a block; LoRA has 32·(768 + 768) at each of them
    assert added(vit_b_16, "lora-sb", {"rank": 32}, 100)[0] == 24 * 32**2
    assert added(vit_b_16, "lora", {"rank": 32}, 100)[0] == 24 * 32 * (768 + 768)


def test_quantiser_codes_are_the_quartiles_of_the_normal_distribution() -> None:
    assert pytest.approx(CODE, abs=1e-15) == NormalDist().inv_cdf(0.75)
    assert round(CODE, 4) == 0.6745
