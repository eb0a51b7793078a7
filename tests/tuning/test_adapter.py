# SPDX-License-Identifier: Apache-2.0
"""AdaptFormer, its 1-bit form and 1-bit LoRA, each against hooks on the plain network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tuning.backbones import load_backbone
from tuning.methods import method_named
from tuning.methods.one_bit_lora import OneBitLowRank

CODE = 0.6744897501960817
# Where each architecture's feed-forward part reads the residual stream, and where it ends.
PLACES = {
    "image": ("vit.layers.{}", "layernorm_after", "mlp.fc2", ("attention.q_proj",
              "attention.v_proj")),
    "text": ("bert.encoder.layer.{}", "intermediate.dense", "output.dense",
             ("attention.self.query", "attention.self.value")),
}  # fmt: skip


def literally(weight: torch.Tensor) -> torch.Tensor:
    mean, deviation = weight.mean(), weight.std(unbiased=True)
    return torch.where((weight - mean) / (deviation + 1e-5) >= 0, CODE, -CODE) * deviation + mean


@pytest.fixture
def pair(tiny_vit: Path, tiny_bert: Path) -> Callable[..., tuple[Any, Any, dict[str, Any]]]:
    """The plain model, a tuned one with stirred tensors, and a batch."""

    def make(method: str, kind: str, *, stir: float = 0.3, **settings: Any) -> Any:
        folder = tiny_vit if kind == "image" else tiny_bert
        plain = load_backbone(folder, classes=4, seed=1, max_length=8).model
        tuned = method_named(method, settings).attach(
            load_backbone(folder, classes=4, seed=1, max_length=8), seed=1
        )
        generator = torch.Generator().manual_seed(2)
        inside = dict(tuned.module.named_parameters())
        with torch.no_grad():
            for name, value in tuned.parameters().items():
                if name.endswith((".down", ".up")):
                    noise = stir * torch.randn(value.shape, generator=generator)
                    inside[tuned.trainable[name]].add_(noise)
        if kind == "image":
            return plain, tuned, {"pixel_values": torch.randn(3, 1, 8, 8, generator=generator)}
        mask = torch.zeros(3, 1, 1, 8)
        mask[1, ..., 4:] = -10000.0
        ids = torch.randint(4, 14, (3, 8), generator=generator)
        return plain, tuned, {"input_ids": ids, "attention_mask": mask}

    return make


@pytest.mark.parametrize("kind", ["image", "text"])
@pytest.mark.parametrize("method", ["adapter", "one-bit-adapter"])
def test_bottleneck_reads_the_residual_stream_beside_the_feed_forward_part(
    pair: Callable[..., Any], method: str, kind: str
) -> None:
    plain, tuned, batch = pair(method, kind, width=3, scale=0.5)
    used = literally if method == "one-bit-adapter" else (lambda weight: weight)
    tensors = tuned.parameters()
    block_path, read, write, _ = PLACES[kind]
    for index in (0, 1):
        block = block_path.format(index)
        seen: list[torch.Tensor] = []
        down = used(tensors[f"{block}.{write}.down"])
        up = used(tensors[f"{block}.{write}.up"])
        plain.get_submodule(f"{block}.{read}").register_forward_pre_hook(
            lambda module, inputs, seen=seen: seen.append(inputs[0])
        )
        plain.get_submodule(f"{block}.{write}").register_forward_hook(
            lambda module, inputs, out, seen=seen, down=down, up=up: (
                out + 0.5 * torch.relu(seen[-1] @ down.T) @ up.T
            )
        )
    with torch.no_grad():
        found, expected = tuned.module(**batch).logits, plain(**batch).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["image", "text"])
def test_one_bit_lora_adds_two_quantised_factors_without_relu(
    pair: Callable[..., Any], kind: str
) -> None:
    plain, tuned, batch = pair("one-bit-lora", kind, rank=3, scale=0.5)
    tensors = tuned.parameters()
    block_path, _, _, layers = PLACES[kind]
    for index in (0, 1):
        for layer in layers:
            path = f"{block_path.format(index)}.{layer}"
            down = literally(tensors[f"{path}.down"])
            up = literally(tensors[f"{path}.up"])
            plain.get_submodule(path).register_forward_hook(
                lambda module, inputs, out, down=down, up=up: out + 0.5 * inputs[0] @ down.T @ up.T
            )
    with torch.no_grad():
        found, expected = tuned.module(**batch).logits, plain(**batch).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        folded = tuned.fold(tuned.module)
        torch.testing.assert_close(folded(**batch).logits, expected, rtol=0, atol=1e-5)
    assert not [m for m in folded.modules() if isinstance(m, OneBitLowRank)]


def test_adapter_starts_as_the_network_was(pair: Callable[..., Any]) -> None:
    plain, tuned, batch = pair("adapter", "image", stir=0.0)
    with torch.no_grad():
        assert torch.equal(tuned.module(**batch).logits, plain(**batch).logits)


@pytest.mark.parametrize("method", ["one-bit-adapter", "one-bit-lora"])
def test_up_starts_within_two_of_its_deviations(pair: Callable[..., Any], method: str) -> None:
    _, tuned, _ = pair(method, "image", stir=0.0)
    ups = torch.cat([v.flatten() for n, v in tuned.parameters().items() if n.endswith(".up")])
    assert float(ups.abs().max()) <= 2e-3
    assert 0.75e-3 < float(ups.std()) < 1e-3  # of a normal cut at two deviations: 0.88
    downs = [v for n, v in tuned.parameters().items() if n.endswith(".down")]
    for down in downs:
        bound = (6 / sum(down.shape)) ** 0.5  # Xavier
        assert 0.8 * bound < float(down.abs().max()) <= bound


def test_default_width_has_the_published_count(pair: Callable[..., Any]) -> None:
    _, tuned, _ = pair("one-bit-adapter", "image", width=5)
    added = {n: v for n, v in tuned.parameters().items() if not n.startswith("classifier")}
    assert sum(value.numel() for value in added.values()) == 2 * 2 * 16 * 5
    assert sorted({tuple(value.shape) for value in added.values()}) == [(5, 16), (16, 5)]


def test_batch_is_not_kept_after_a_pass(pair: Callable[..., Any]) -> None:
    _, tuned, batch = pair("adapter", "image")
    tuned.module(**batch)
    assert all(m.seen is None for m in tuned.module.modules() if hasattr(m, "seen"))
