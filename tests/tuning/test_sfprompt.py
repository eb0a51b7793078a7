# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tuning.backbones import Backbone, load_backbone
from tuning.errors import MethodError
from tuning.methods import Tuned, method_named

PATCHES = 4


def attached(folder: Path, **settings: Any) -> tuple[Backbone, Tuned]:
    backbone = load_backbone(folder, classes=4, seed=1, max_length=8)
    return backbone, method_named("sfprompt", settings).attach(backbone, seed=1)


def images(count: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.randn(count, 1, 8, 8, generator=generator)}


def test_the_prompt_and_all_of_the_tail_are_trained(tiny_vit: Path) -> None:
    _, tuned = attached(tiny_vit, cut="1+0", length=3)
    assert set(tuned.trainable) == {
        "vit.embeddings.prompt",
        "vit.layernorm.weight",
        "vit.layernorm.bias",
        "classifier.weight",
        "classifier.bias",
    }
    _, minimal = attached(tiny_vit, cut="faithful-minimal", length=3)
    assert set(minimal.trainable) == set(tuned.trainable)
    assert minimal.trainable["vit.layernorm.weight"] == "vit.layernorm.base_layer.weight"


@pytest.mark.parametrize("first", [False, True], ids=["mean of the normed", "norm of the mean"])
def test_the_faithful_cut_reads_the_mean_of_the_patches(tiny_vit: Path, first: bool) -> None:
    backbone, tuned = attached(tiny_vit, cut="faithful-minimal", length=3, pool=first)
    # The literal form: the plain network with the prompt put in by hand, and its own layers.
    plain = load_backbone(tiny_vit, classes=4, seed=1).model
    prompt = tuned.parameters()["vit.embeddings.prompt"]
    with torch.no_grad():
        hidden = plain.vit.embeddings(images()["pixel_values"])
        hidden = torch.cat([hidden[:, :1], prompt.expand(3, -1, -1), hidden[:, 1:]], dim=1)
        for layer in plain.vit.layers:
            hidden = layer(hidden)
        patches = hidden[:, 1 + 3 :]
        assert patches.shape[1] == PATCHES
        if first:
            read = plain.vit.layernorm(patches.mean(dim=1))
        else:
            read = plain.vit.layernorm(patches).mean(dim=1)
        expected = backbone.model.classifier(read)
        found = tuned.module(**images()).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("settings", [
    {"cut": "faithful-minimal"},
    {"cut": "faithful-minimal", "pool": True},
    {"cut": "1+0"},
    {"cut": "1+0", "pool": True},
], ids=str)  # fmt: skip
def test_the_parts_are_the_network(tiny_vit: Path, settings: dict[str, Any]) -> None:
    _, tuned = attached(tiny_vit, length=3, **settings)
    parts = tuned.parts
    assert parts is not None
    with torch.no_grad():
        left = parts.body(parts.head(**images()))
        assert left.shape == (3, 1 if settings.get("pool") else 1 + 3 + PATCHES, 16)
        found, expected = parts.tail(left).logits, tuned.module(**images()).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("cut", ["faithful-minimal", "1+0"])
def test_without_the_body_the_logits_still_depend_on_the_image(tiny_vit: Path, cut: str) -> None:
    _, tuned = attached(tiny_vit, cut=cut)
    assert tuned.parts is not None
    with torch.no_grad():
        for module in (tuned.parts.short, tuned.parts.scoring):
            assert float(module(**images()).logits.var(dim=0).min()) > 1e-6


def test_scores_are_taken_without_the_prompt(tiny_vit: Path) -> None:
    _, tuned = attached(tiny_vit, cut="1+0")
    assert tuned.parts is not None
    with torch.no_grad():
        short = tuned.parts.short(**images()).logits
        before = tuned.parts.scoring(**images()).logits
        dict(tuned.module.named_parameters())["vit.embeddings.prompt"][:, :4] += 1.0
        assert torch.equal(tuned.parts.scoring(**images()).logits, before)
        assert not torch.allclose(tuned.parts.short(**images()).logits, short)


def test_texts_are_cut_too(tiny_bert: Path) -> None:
    _, tuned = attached(tiny_bert, cut="1+0", length=3)
    mask = torch.zeros(2, 1, 1, 8)
    mask[1, ..., 5:] = -10_000.0
    ids = torch.randint(4, 14, (2, 8), generator=torch.Generator().manual_seed(0))
    batch = dict(tuned.prepare({"input_ids": ids, "attention_mask": mask}))
    assert tuned.parts is not None
    wide = batch["attention_mask"]
    with torch.no_grad():
        left = tuned.parts.body(tuned.parts.head(**batch), attention_mask=wide)
        found = tuned.parts.tail(left, attention_mask=wide).logits
        torch.testing.assert_close(found, tuned.module(**batch).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("settings", "words"), [
    ({"cut": "private"}, "cannot cut 2 blocks in front and 1 behind from a network of 2"),
    ({"cut": "1+1"}, "a block or more between them"),
], ids=str)  # fmt: skip
def test_a_network_that_is_too_short_is_refused(
    tiny_vit: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(MethodError, match=words):
        attached(tiny_vit, **settings)


@pytest.mark.parametrize(("settings", "words"), [
    ({"cut": "faithful-minimal"}, "it fits images only"),
    ({"cut": "1+0", "pool": True}, "it must be false for texts"),
], ids=str)  # fmt: skip
def test_what_fits_images_only_is_refused_for_texts(
    tiny_bert: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(MethodError, match=words):
        attached(tiny_bert, **settings)
