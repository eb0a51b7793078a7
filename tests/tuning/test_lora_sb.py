# SPDX-License-Identifier: Apache-2.0
"""LoRA-SB: cores between frozen factors, against the plain network with products in its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from tuning.backbones import load_backbone
from tuning.errors import MethodError
from tuning.methods import method_named
from tuning.methods.lora_sb import CoreLowRank, leading_directions

RANK, SCALE, WIDTH, CLASSES = 3, 0.5, 16, 4
LAYERS = {
    "image": [f"vit.layers.{b}.attention.{n}" for b in (0, 1) for n in ("q_proj", "v_proj")],
    "text": [
        f"bert.encoder.layer.{b}.attention.self.{n}" for b in (0, 1) for n in ("query", "value")
    ],
}
Models = tuple[torch.nn.Module, Any, Mapping[str, torch.Tensor]]


@pytest.fixture
def pair(tiny_vit: Path, tiny_bert: Path) -> Callable[..., Models]:
    """The plain model, a tuned one, and a batch."""

    def make(kind: str, *, rank: int = RANK, scale: float = SCALE) -> Models:
        folder = tiny_vit if kind == "image" else tiny_bert
        plain, base = (load_backbone(folder, classes=CLASSES, seed=1, max_length=8) for _ in "ab")
        tuned = method_named("lora-sb", {"rank": rank, "scale": scale}).attach(base, seed=1)
        generator = torch.Generator().manual_seed(2)
        if kind == "image":
            batch = {"pixel_values": torch.randn(3, 1, 8, 8, generator=generator)}
        else:
            mask = torch.zeros(3, 1, 1, 8)
            mask[1, ..., 4:] = -10000.0
            ids = torch.randint(4, 14, (3, 8), generator=generator)
            batch = {"input_ids": ids, "attention_mask": mask}
        return plain.model, tuned, batch

    return make


def stir(tuned: Any) -> None:
    """Draw every core."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in tuned.module.modules():
            if isinstance(layer, CoreLowRank):
                layer.core.normal_(generator=generator)


def merge_literally(plain: torch.nn.Module, tuned: Any, paths: list[str]) -> None:
    """Add s·B·R·A, computed in float64, to the plain model's own weights."""
    with torch.no_grad():
        for path in paths:
            layer = tuned.module.get_submodule(path)
            product = layer.up.double() @ layer.core.double() @ layer.down.double()
            plain.get_submodule(path).weight.add_(SCALE * product)


@pytest.mark.parametrize("kind", ["image", "text"])
def test_network_starts_as_the_backbone(pair: Callable[..., Models], kind: str) -> None:
    plain, tuned, batch = pair(kind)
    with torch.no_grad():
        assert torch.equal(tuned.module(**batch).logits, plain(**batch).logits)


@pytest.mark.parametrize("kind", ["image", "text"])
def test_cores_and_classifier_alone_are_trained(pair: Callable[..., Models], kind: str) -> None:
    _, tuned, _ = pair(kind)
    cores = {f"{path}.core" for path in LAYERS[kind]}
    assert set(tuned.parameters()) == cores | {"classifier.weight", "classifier.bias"}
    # r² a layer, two layers in each of two blocks, and the classifier's weight and bias
    count = sum(value.numel() for value in tuned.parameters().values())
    assert count == 2 * 2 * RANK**2 + CLASSES * WIDTH + CLASSES
    factors = {f"{path}.{name}" for path in LAYERS[kind] for name in ("down", "up")}
    assert factors <= set(tuned.frozen())
    assert tuned.pairs == ()


@pytest.mark.parametrize("kind", ["image", "text"])
def test_factors_are_the_leading_singular_vectors(pair: Callable[..., Models], kind: str) -> None:
    plain, tuned, _ = pair(kind)
    for path in LAYERS[kind]:
        layer = tuned.module.get_submodule(path)
        up, down = layer.up.double(), layer.down.double()
        torch.testing.assert_close(up.T @ up, torch.eye(RANK).double(), rtol=0, atol=1e-6)
        torch.testing.assert_close(down @ down.T, torch.eye(RANK).double(), rtol=0, atol=1e-6)
        weight = plain.get_submodule(path).weight.detach().numpy().astype(np.float64)
        values = np.linalg.svd(weight, compute_uv=False)[:RANK]
        projected = up.numpy().T @ weight @ down.numpy().T
        np.testing.assert_allclose(projected, np.diag(values), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_signs_do_not_depend_on_the_decomposition(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    up, down = leading_directions(weight, 4)
    assert up.shape == (shape[0], 4) and down.shape == (4, shape[1])
    assert (up.gather(0, up.abs().argmax(dim=0, keepdim=True)) > 0).all()
    usual = torch.linalg.svd

    def turned(matrix: torch.Tensor, **options: Any) -> Any:
        left, values, right = usual(matrix, **options)
        return -left, values, -right

    monkeypatch.setattr(torch.linalg, "svd", turned)
    for again, before in zip(leading_directions(weight, 4), (up, down), strict=True):
        assert torch.equal(again, before)


@pytest.mark.parametrize("kind", ["image", "text"])
def test_network_is_the_plain_one_with_products_in_its_weights(
    pair: Callable[..., Models], kind: str
) -> None:
    plain, tuned, batch = pair(kind)
    stir(tuned)
    with torch.no_grad():
        before = plain(**batch).logits
        merge_literally(plain, tuned, LAYERS[kind])
        found, expected = tuned.module(**batch).logits, plain(**batch).logits
        assert (expected - before).abs().max() > 0.01, "the cores change nothing that shows"
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        folded = tuned.fold(tuned.module)
        torch.testing.assert_close(folded(**batch).logits, expected, rtol=0, atol=1e-5)
    assert set(folded.state_dict()) == set(plain.state_dict())


@pytest.mark.parametrize("start", ["backbone", "stirred"])
def test_gradient_of_a_core_is_that_of_the_weight_projected(
    pair: Callable[..., Models], start: str
) -> None:
    plain, tuned, batch = pair("image")
    # A fresh classifier lets little gradient through: in float64 it is far above the rounding.
    plain, module = plain.double(), tuned.module.double()
    batch = {name: value.double() for name, value in batch.items()}
    if start == "stirred":
        stir(tuned)
        merge_literally(plain, tuned, LAYERS["image"])
    labels = torch.tensor([0, 2, 3])
    for model in (plain, module):
        model.requires_grad_(True)
        torch.nn.functional.cross_entropy(model(**batch).logits, labels).backward()
    for path in LAYERS["image"]:
        layer = module.get_submodule(path)
        full = plain.get_submodule(path).weight.grad
        expected = SCALE * layer.up.T @ full @ layer.down.T
        assert expected.abs().max() > 1e-5, "too small to tell anything"
        torch.testing.assert_close(layer.core.grad, expected, rtol=0, atol=1e-12)


CORES = st.lists(
    st.tuples(
        npst.arrays(np.float32, (RANK, RANK), elements=st.floats(-10, 10, width=32)),
        st.integers(1, 1000),
    ),
    min_size=1,
    max_size=6,
)


@given(CORES)
def test_layer_of_the_mean_core_is_the_mean_of_the_clients_layers(
    clients: list[tuple[np.ndarray, int]],
) -> None:
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(5))

    def layer_with(core: np.ndarray) -> torch.Tensor:
        base = torch.nn.Linear(5, 6).double()
        base.weight = torch.nn.Parameter(weight.double())
        layer = CoreLowRank(base, rank=RANK, scale=SCALE)
        layer.core = torch.nn.Parameter(torch.from_numpy(core.astype(np.float64)))
        return layer.folded().weight

    total = sum(samples for _, samples in clients)
    mean = sum(samples / total * core.astype(np.float64) for core, samples in clients)
    expected = sum(samples / total * layer_with(core) for core, samples in clients)
    torch.testing.assert_close(layer_with(np.asarray(mean)), expected, rtol=0, atol=1e-12)


def test_rank_of_the_whole_layer_is_the_largest(pair: Callable[..., Models]) -> None:
    _, tuned, _ = pair("image", rank=WIDTH)
    assert tuned.parameters()[f"{LAYERS['image'][0]}.core"].shape == (WIDTH, WIDTH)
    with pytest.raises(
        MethodError,
        match=r"method\.rank: expected at most 16, the smaller side of "
        r"vit\.layers\.0\.attention\.q_proj \[16, 16\], found 17",
    ):
        pair("image", rank=WIDTH + 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "method.rank is 0; it must be at least 1"),
        ({"rank": 2.5}, "method.rank is 2.5; expected a whole number"),
        ({"scale": 0}, "method.scale is 0.0; it must be above 0"),
        ({"scale": float("nan")}, "method.scale is nan; it must be above 0"),
        ({"alpha": 2.0}, 'method "lora-sb" has no setting "alpha"; known: rank, scale'),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        method_named("lora-sb", settings)
