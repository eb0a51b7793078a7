# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch

from tuning.backbones import load_backbone
from tuning.cuts import Cut, Parts, Pool, block_count, cut_network
from tuning.errors import MethodError

BLOCKS = 4
LEGAL = [(head, tail) for head in range(BLOCKS) for tail in range(BLOCKS - head)]


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A network of four blocks of each family, with a batch of three samples."""
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        LlamaConfig,
        LlamaForSequenceClassification,
        ViTConfig,
        ViTForImageClassification,
    )

    small = {
        "hidden_size": 16,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    text = {**small, "vocab_size": 20, "max_position_embeddings": 12, "pad_token_id": 0}
    models = {
        "vit": ViTForImageClassification(
            ViTConfig(image_size=8, patch_size=4, num_channels=1, **small)
        ),
        "bert": BertForSequenceClassification(BertConfig(**text)),
        "llama": LlamaForSequenceClassification(LlamaConfig(num_key_value_heads=1, **text)),
    }
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(3, 1, 1, 6)
    mask[1, ..., 4:] = -10_000.0
    texts = {
        "input_ids": torch.randint(1, 20, (3, 6), generator=generator),
        "attention_mask": mask,
    }
    made = {}
    for name, model in models.items():
        for parameter in model.parameters():
            parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        folder = tmp_path_factory.mktemp("cuts") / name
        model.save_pretrained(folder)
        backbone = load_backbone(folder, classes=3, seed=0, max_length=6)
        images = {"pixel_values": torch.randn(3, 1, 8, 8, generator=generator)}
        made[name] = (backbone, images if name == "vit" else texts)
    return made


def cut_of(backbone: Any, head: int, tail: int, *, pool: Pool | None = None) -> Parts:
    """So many blocks of a backbone's network in front and behind."""
    cut = Cut(head=head, tail=tail)
    return cut_network(backbone.model, backbone.family, backbone.classifier, cut, pool=pool)


def through(parts: Parts, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits by way of head, body and tail."""
    masks = {name: value for name, value in batch.items() if name == "attention_mask"}
    entered = parts.head(**batch)
    left = parts.body(entered, **masks)
    logits: torch.Tensor = parts.tail(left, **masks).logits
    return logits


@pytest.mark.parametrize("cut", LEGAL, ids=str)
@pytest.mark.parametrize("family", ["vit", "bert", "llama"])
def test_parts_after_one_another_are_the_network(
    networks: dict[str, Any], family: str, cut: tuple[int, int]
) -> None:
    backbone, batch = networks[family]
    whole = backbone.model
    parts = cut_of(backbone, *cut)
    parameters = dict(whole.named_parameters())

    def gradients(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2]))
        return torch.autograd.grad(loss, parameters.values(), allow_unused=True)

    expected, found = whole(**batch).logits, through(parts, batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    for name, one, other in zip(parameters, gradients(expected), gradients(found), strict=True):
        if one is None:
            assert other is None, name
        else:
            torch.testing.assert_close(other, one, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", ["vit", "bert", "llama"])
def test_every_weight_is_in_one_part(networks: dict[str, Any], family: str) -> None:
    backbone, _ = networks[family]
    parts = cut_of(backbone, 1, 1)
    names = [set(part.weights()) for part in (parts.head, parts.body, parts.tail)]
    head, body, tail = names
    assert head | body | tail == set(backbone.model.state_dict())
    assert not body & head, "the server has nothing of the device's"
    assert not body & tail, "the server has nothing of the device's"
    blocks = backbone.family.blocks
    assert all(name.startswith((f"{blocks}.1.", f"{blocks}.2.")) for name in body)


def test_the_short_way_skips_the_body(networks: dict[str, Any]) -> None:
    backbone, batch = networks["vit"]
    parts = cut_of(backbone, 1, 1)
    with torch.no_grad():
        found = parts.short(**batch).logits
        expected = parts.tail(parts.head(**batch)).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_what_leaves_the_body_may_be_pooled(networks: dict[str, Any]) -> None:
    backbone, batch = networks["vit"]
    parts = cut_of(backbone, 1, 0, pool=lambda hidden: hidden[:, :1])
    with torch.no_grad():
        left = parts.body(parts.head(**batch))
        assert left.shape == (3, 1, 16)
        expected = backbone.model(**batch).logits
        torch.testing.assert_close(parts.tail(left).logits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("cut", [(-1, 0), (0, -1), (4, 0), (2, 2), (0, 9)], ids=str)
def test_cuts_that_leave_the_server_nothing_are_refused(
    networks: dict[str, Any], cut: tuple[int, int]
) -> None:
    backbone, _ = networks["vit"]
    assert block_count(backbone.model, backbone.family) == BLOCKS
    with pytest.raises(MethodError, match="from a network of 4: expected 0 or more each"):
        cut_of(backbone, *cut)
