# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tuning.backbones import load_backbone
from tuning.methods import method_named
from tuning.methods.ssf import ScaleShift, fold_scales


def pixels(rows: int = 3) -> torch.Tensor:
    return torch.randn(rows, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_zero_tensors_are_the_network_as_it_was(tiny_vit: Path) -> None:
    plain = load_backbone(tiny_vit, classes=4, seed=1).model
    tuned = method_named("ssf", {"init_std": 0.0}).attach(
        load_backbone(tiny_vit, classes=4, seed=1), seed=1
    )
    added = {n: v for n, v in tuned.parameters().items() if not n.startswith("classifier")}
    assert all(bool((value == 0).all()) for value in added.values())
    with torch.no_grad():
        assert torch.equal(tuned.module(pixels()).logits, plain(pixels()).logits)


def test_start_is_drawn_as_the_paper_does(tiny_vit: Path) -> None:
    tuned = method_named("ssf", {}).attach(load_backbone(tiny_vit, classes=4, seed=1), seed=1)
    drawn = {n: v for n, v in tuned.parameters().items() if not n.startswith("classifier")}
    values = torch.cat([value.flatten() for value in drawn.values()])
    assert float(values.std()) == pytest.approx(0.02, rel=0.15)
    assert abs(float(values.mean())) < 0.004


def test_every_site_of_the_paper_is_there(tiny_vit: Path) -> None:
    tuned = method_named("ssf", {}).attach(load_backbone(tiny_vit, classes=4, seed=1), seed=1)
    sites = {
        name.removesuffix(".scale"): value.numel()
        for name, value in tuned.parameters().items()
        if name.endswith(".scale")
    }
    block = {
        "layernorm_before": 16, "attention.q_proj": 16, "attention.k_proj": 16,
        "attention.v_proj": 16, "attention.o_proj": 16, "layernorm_after": 16,
        "mlp.fc1": 32, "mlp.fc2": 16,
    }  # fmt: skip
    expected = {f"vit.layers.{i}.{name}": size for i in (0, 1) for name, size in block.items()}
    expected |= {"vit.embeddings.patch_embeddings.projection": 16, "vit.layernorm": 16}
    assert sites == expected


def test_outputs_are_scaled_and_shifted_at_every_site(tiny_vit: Path) -> None:
    """Hooks on the plain network do literally what the paper says."""
    model = load_backbone(tiny_vit, classes=4, seed=1).model
    tuned = method_named("ssf", {"init_std": 0.3}).attach(
        load_backbone(tiny_vit, classes=4, seed=1), seed=1
    )
    tensors = tuned.parameters()
    for name in tensors:
        if name.endswith(".scale"):
            path = name.removesuffix(".scale")
            gamma, beta = 1 + tensors[name], tensors[f"{path}.shift"]

            def affine(
                module: object,
                inputs: object,
                out: torch.Tensor,
                gamma: torch.Tensor = gamma,
                beta: torch.Tensor = beta,
            ) -> torch.Tensor:
                axis = 1 if out.dim() == 4 else -1
                return (out.movedim(axis, -1) * gamma + beta).movedim(-1, axis)

            model.get_submodule(path).register_forward_hook(affine)
    with torch.no_grad():
        expected, found = model(pixels()).logits, tuned.module(pixels()).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_folding_is_exact_and_leaves_no_site(tiny_vit: Path) -> None:
    tuned = method_named("ssf", {"init_std": 0.3}).attach(
        load_backbone(tiny_vit, classes=4, seed=1), seed=1
    )
    with torch.no_grad():
        before = tuned.module(pixels()).logits
        folded = fold_scales(tuned.module)
        after = folded(pixels()).logits
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
    assert not [m for m in folded.modules() if isinstance(m, ScaleShift)]


def test_layer_without_bias_gets_one_by_folding() -> None:
    layer = torch.nn.Linear(3, 2, bias=False)
    wrapped = ScaleShift(layer, 2, -1)
    torch.nn.init.normal_(wrapped.scale)
    torch.nn.init.normal_(wrapped.shift)
    hidden = torch.randn(5, 3)
    expected = wrapped(hidden)
    torch.testing.assert_close(wrapped.folded()(hidden), expected)
