# SPDX-License-Identifier: Apache-2.0
"""Local Hugging Face folders, which the fixtures save, as backbones."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from tuning.backbones import backbone_folder, load_backbone, named_backbones
from tuning.backbones.patches import PatchProjection
from tuning.errors import BackboneError


def test_image_folder_gives_the_saved_network(tiny_vit: Path) -> None:
    from transformers import ViTForImageClassification

    backbone = load_backbone(tiny_vit, classes=7, seed=3)
    assert (backbone.name, backbone.kind) == ("tiny-vit", "image")
    assert backbone.classifier == "classifier"
    pre = backbone.preprocessing
    assert (pre.kind, pre.size, pre.channels, pre.mean, pre.std) == ("image", 8, 1, (0.3,), (0.4,))
    saved = ViTForImageClassification.from_pretrained(
        tiny_vit, num_labels=7, ignore_mismatched_sizes=True
    ).eval()
    saved.classifier.load_state_dict(backbone.model.classifier.state_dict())  # type: ignore[union-attr]
    pixels = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = saved(pixels).logits
        found = backbone.model(pixel_values=pixels).logits
    assert found.shape == (3, 7)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not [m for m in backbone.model.modules() if isinstance(m, nn.Conv2d)]


def test_text_folder_gives_the_saved_network_under_its_additive_mask(tiny_bert: Path) -> None:
    from transformers import BertForSequenceClassification

    backbone = load_backbone(tiny_bert, classes=3, seed=3, max_length=8)
    assert (backbone.kind, backbone.preprocessing.max_length) == ("text", 8)
    saved = BertForSequenceClassification.from_pretrained(
        tiny_bert, num_labels=3, ignore_mismatched_sizes=True
    ).eval()
    saved.classifier.load_state_dict(backbone.model.classifier.state_dict())  # type: ignore[union-attr]
    ids = torch.tensor([[2, 5, 6, 7, 3, 0, 0, 0], [2, 9, 3, 0, 0, 0, 0, 0]])
    mask = (ids != 0).long()
    added = (1.0 - mask.float())[:, None, None, :] * -10000.0
    with torch.no_grad():
        expected = saved(input_ids=ids, attention_mask=mask).logits
        found = backbone.model(input_ids=ids, attention_mask=added).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_classifier_is_drawn_from_the_seed_alone(tiny_vit: Path) -> None:
    first, again, other = (load_backbone(tiny_vit, classes=4, seed=s).model for s in (1, 1, 2))
    assert torch.equal(first.classifier.weight, again.classifier.weight)  # type: ignore[union-attr]
    assert not torch.equal(first.classifier.weight, other.classifier.weight)  # type: ignore[union-attr]
    assert not first.classifier.bias.any()  # type: ignore[union-attr, operator]
    assert torch.equal(first.vit.layernorm.weight, other.vit.layernorm.weight)  # type: ignore[union-attr]


def test_random_weights_forget_the_folders(tiny_vit: Path) -> None:
    kept = load_backbone(tiny_vit, classes=4, seed=1).model.state_dict()
    drawn = load_backbone(tiny_vit, classes=4, seed=1, random_weights=True).model.state_dict()
    again = load_backbone(tiny_vit, classes=4, seed=1, random_weights=True).model.state_dict()
    assert drawn.keys() == kept.keys()
    name = "vit.layers.0.mlp.fc1.weight"
    assert not torch.equal(drawn[name], kept[name])
    assert all(torch.equal(drawn[key], again[key]) for key in drawn)


def test_convolutional_network_is_refused(tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=3
    )
    config.image_size = 8
    ResNetForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match=r"only patch embeddings .* can be compiled"):
        load_backbone(tmp_path, classes=3, seed=0)


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(BackboneError, match="known: vit-small-28, all-minilm-l6-v2, or give"):
        backbone_folder("resnet")
    assert named_backbones() == ("vit-small-28", "all-minilm-l6-v2")


def test_folder_that_is_no_model_is_refused(tiny_vit: Path, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"has no config\.json"):
        load_backbone(tmp_path, classes=3, seed=0)
    (tmp_path / "config.json").write_text('{"model_type": "no-such-thing"}')
    with pytest.raises(BackboneError, match="cannot be loaded as a classifier"):
        load_backbone(tmp_path, classes=3, seed=0)
    without = tmp_path / "without"
    without.mkdir()
    shutil.copyfile(tiny_vit / "config.json", without / "config.json")
    with pytest.raises(BackboneError, match="cannot be loaded as a classifier"):
        load_backbone(without, classes=3, seed=0)


def test_weights_that_are_cut_off_are_refused(tiny_vit: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(tiny_vit, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BackboneError, match="cannot be loaded as a classifier"):
        load_backbone(folder, classes=3, seed=0)


def test_one_class_is_no_classifier(tiny_vit: Path) -> None:
    with pytest.raises(BackboneError, match="at least 2 classes, the data has 1"):
        load_backbone(tiny_vit, classes=1, seed=0)


def test_longer_texts_than_the_model_reads_are_refused(tiny_bert: Path) -> None:
    with pytest.raises(BackboneError, match=r"data\.max_length is 13, but tiny-bert reads at most"):
        load_backbone(tiny_bert, classes=3, seed=0, max_length=13)


def test_means_must_have_one_value_a_channel(tiny_vit: Path, tmp_path: Path) -> None:
    folder = tmp_path / "vit"
    shutil.copytree(tiny_vit, folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2]}')
    with pytest.raises(BackboneError, match="must have 1 values, one a channel"):
        load_backbone(folder, classes=3, seed=0)


@pytest.mark.parametrize("method", ["adapter", "prompt", "one-bit-lora", "lora", "lora-sb"])
def test_family_that_is_not_listed_is_told_what_fits(tiny_vit: Path, method: str) -> None:
    from dataclasses import replace

    from tuning.errors import MethodError
    from tuning.methods import method_named

    stranger = replace(load_backbone(tiny_vit, classes=3, seed=0), family=None)
    with pytest.raises(MethodError, match=r"ViT, BERT and LLaMA|set method\.targets"):
        method_named(method, {}).attach(stranger, seed=0)


def test_patch_projection_equals_the_convolution() -> None:
    convolution = nn.Conv2d(3, 5, kernel_size=4, stride=4)
    images = torch.randn(2, 3, 12, 8)
    torch.testing.assert_close(PatchProjection(convolution)(images), convolution(images))


@pytest.mark.parametrize(
    ("settings", "fits"),
    [
        ({"kernel_size": 4, "stride": 4}, True),
        ({"kernel_size": 4, "stride": 2}, False),
        ({"kernel_size": 4, "stride": 4, "padding": 1}, False),
        ({"kernel_size": (4, 2), "stride": (4, 2)}, False),
        ({"kernel_size": 2, "stride": 2, "dilation": 2}, False),
    ],
)
def test_only_disjoint_square_patches_fit(settings: dict[str, int], fits: bool) -> None:
    assert PatchProjection.fits(nn.Conv2d(2, 4, **settings)) is fits  # type: ignore[arg-type]
