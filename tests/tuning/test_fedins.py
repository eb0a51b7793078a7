# SPDX-License-Identifier: Apache-2.0
"""FedIns: the literal algorithm of the paper, image by image, beside the batched one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coordinator.sections import TrainingSection
from edge_runtime.trainer import OnnxTrainer
from tuning.backbones import load_backbone
from tuning.errors import MethodError
from tuning.methods import Tuned, method_named
from tuning.methods.fedins import InstancePool, PooledScaleShift, fold_element, leading
from tuning.quantizer import one_bit

CLASSES = 4


def pixels(rows: int = 5) -> torch.Tensor:
    return torch.randn(rows, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def attached(folder: Path, **settings: Any) -> Tuned:
    # Wide, so that elements and images tell themselves apart.
    settings = {"elements": 6, "selected": 2, "init_std": 0.3, **settings}
    return method_named("fedins", settings).attach(
        load_backbone(folder, classes=CLASSES, seed=1), seed=1
    )


def per_site(tuned: Tuned) -> dict[str, Sequence[torch.Tensor]]:
    """Scale and shift [elements, channels] of every site by the backbone's own name for it."""
    pool = tuned.module
    assert isinstance(pool, InstancePool)
    parts = pool.parts(pool.used().detach())
    return {
        path: site.own(parts)
        for path, site in pool.model.named_modules()
        if isinstance(site, PooledScaleShift)
    }


def alone(folder: Path, tuned: Tuned, chosen: list[int], image: torch.Tensor) -> torch.Tensor:
    """Logits of one image: hooks on the plain network scale and shift by the mean of the chosen."""
    model = load_backbone(folder, classes=CLASSES, seed=1).model
    tensors, places = tuned.parameters(), per_site(tuned)
    for path, layer in model.named_modules():
        if path not in places:
            continue
        scale, shift = (part[chosen].mean(dim=0) for part in places[path])
        axes = (-1, 1, 1) if "projection" in path else (-1,)
        gamma, beta = 1 + scale.reshape(axes), shift.reshape(axes)
        layer.register_forward_hook(lambda _, __, out, g=gamma, b=beta: out * g + b)
    model.classifier = torch.nn.Identity()
    features = model(pixel_values=image[None]).logits[0]
    classifier = {name: tensors[f"classifier.{name}"] for name in ("weight", "bias")}
    scores = [classifier["weight"][j] @ features + classifier["bias"][j] for j in chosen]
    return torch.stack(scores).mean(dim=0)


def query_of(folder: Path, images: torch.Tensor) -> torch.Tensor:
    model = load_backbone(folder, classes=CLASSES, seed=1).model
    model.classifier = torch.nn.Identity()
    return model(pixel_values=images).logits


@pytest.mark.parametrize("selected", [1, 2, 6])
def test_every_image_has_the_elements_that_its_own_features_choose(
    tiny_vit: Path, selected: int
) -> None:
    tuned = attached(tiny_vit, selected=selected)
    images, keys = pixels(), tuned.parameters()["keys"]
    with torch.no_grad():
        answer = tuned.module(pixel_values=images)
        query = query_of(tiny_vit, images)
        for row, image in enumerate(images):
            cosines = torch.stack(
                [torch.nn.functional.cosine_similarity(key, query[row], dim=0) for key in keys]
            )
            chosen = sorted(range(len(keys)), key=lambda j: (-float(cosines[j]), j))[:selected]
            assert set(answer.selected[row].nonzero().flatten().tolist()) == set(chosen)
            similarity = float(answer.similarity[row])
            assert similarity == pytest.approx(float(cosines[chosen].sum()), abs=1e-5)
            expected = alone(tiny_vit, tuned, chosen, image)
            torch.testing.assert_close(answer.logits[row], expected, rtol=0, atol=1e-5)
    if selected == 2:
        assert len({tuple(row.tolist()) for row in answer.selected}) > 1, "images choose alike"


def test_logits_of_an_image_depend_on_no_other_image(tiny_vit: Path) -> None:
    tuned, images = attached(tiny_vit), pixels(7)
    with torch.no_grad():
        together = tuned.module(pixel_values=images).logits
        for size in (1, 2, 3):
            parts = [tuned.module(pixel_values=part).logits for part in images.split(size)]
            torch.testing.assert_close(torch.cat(parts), together, rtol=0, atol=1e-5)
        shuffled = tuned.module(pixel_values=images.flip(0)).logits.flip(0)
        torch.testing.assert_close(shuffled, together, rtol=0, atol=1e-5)


def test_only_what_was_selected_has_a_gradient(tiny_vit: Path) -> None:
    tuned = attached(tiny_vit)
    parameters = dict(tuned.module.named_parameters())
    answer = tuned.module(pixel_values=pixels(2))
    entropies = torch.nn.functional.cross_entropy(
        answer.logits, torch.tensor([0, 1]), reduction="none"
    )
    tuned.sample_loss(entropies, answer).sum().backward()
    used = answer.selected.sum(dim=0) > 0
    assert 0 < int(used.sum()) < 6
    for name, inside in tuned.trainable.items():
        gradient = parameters[inside].grad
        assert gradient is not None and gradient.shape[0] == 6, name
        moved = gradient.flatten(1).abs().sum(dim=1) > 0
        assert not bool((moved & ~used).any()), name
    assert bool((parameters["keys"].grad.abs().sum(dim=1) > 0)[used].all())


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.5])
def test_loss_is_the_paper_s(tiny_vit: Path, weight: float) -> None:
    tuned = attached(tiny_vit, key_weight=weight)
    answer = tuned.module(pixel_values=pixels(3))
    entropies = torch.tensor([1.0, 2.0, 3.0])
    expected = (1 - weight) * entropies + weight * (1 - answer.similarity)
    torch.testing.assert_close(tuned.sample_loss(entropies, answer), expected)


def test_frozen_weights_are_there_once(tiny_vit: Path) -> None:
    tuned = attached(tiny_vit)
    plain = load_backbone(tiny_vit, classes=CLASSES, seed=1).model
    count = sum(
        value.numel() for name, value in plain.state_dict().items() if "classifier" not in name
    )
    assert sum(value.numel() for value in tuned.frozen().values()) == count
    assert set(tuned.trainable) == set(tuned.parameters())
    assert all(value.shape[0] == 6 for value in tuned.parameters().values())


@pytest.mark.parametrize("index", [0, 3])
def test_one_element_folds_into_the_backbone(tiny_vit: Path, index: int) -> None:
    tuned = attached(tiny_vit)
    with torch.no_grad():
        expected = torch.stack([alone(tiny_vit, tuned, [index], image) for image in pixels()])
        folded = fold_element(tuned.module, index)
        found = folded(pixel_values=pixels()).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    plain = load_backbone(tiny_vit, classes=CLASSES, seed=1).model
    # The very network: the same layers, of which norms and linear ones have a bias now.
    assert [type(layer) for layer in folded.modules()] == [type(layer) for layer in plain.modules()]


def test_a_pool_without_the_element_is_told(tiny_vit: Path) -> None:
    with pytest.raises(MethodError, match="element is 6; the pool has 0 to 5"):
        fold_element(attached(tiny_vit).module, 6)


def test_a_pool_of_one_is_ssf(tiny_vit: Path) -> None:
    pool = attached(tiny_vit, elements=1, selected=1, key_weight=0.0)
    ssf = method_named("ssf", {"init_std": 0.3}).attach(
        load_backbone(tiny_vit, classes=CLASSES, seed=1), seed=1
    )
    inside = dict(ssf.module.named_parameters())
    tensors, places = pool.parameters(), per_site(pool)
    assert len(places) == (len(ssf.trainable) - 2) / 2
    with torch.no_grad():
        for path, parts in places.items():
            for name, value in zip(("scale", "shift"), parts, strict=True):
                inside[ssf.trainable[f"{path}.{name}"]].copy_(value[0])
        for name in ("weight", "bias"):
            inside[f"classifier.{name}"].copy_(tensors[f"classifier.{name}"][0])
        found = pool.module(pixel_values=pixels()).logits
        expected = ssf.module(pixel_values=pixels()).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert pool.fold is not None and attached(tiny_vit).fold is None


def test_compiled_prediction_chooses_by_image(make_bundle: Callable[..., Any]) -> None:
    training = TrainingSection(learning_rate=0.05, batch_size=4)
    made = make_bundle("fedins", settings={"elements": 5, "selected": 2}, training=training)
    trainer, data, start = OnnxTrainer(made.bundle, threads=1), made.data(9), made.start()
    whole = trainer.evaluate_samples(start, data)[0]
    for rows in (slice(0, 1), slice(3, 7)):
        part = trainer.evaluate_samples(start, {n: v[rows] for n, v in data.items()})[0]
        np.testing.assert_allclose(part, whole[rows], rtol=0, atol=1e-5)
    trained, metrics = trainer.fit(start, data, learning_rate=0.05, epochs=2, seed=1)
    counts = [metrics[f"selected/{j}"] for j in range(5)]
    assert sum(counts) == 2 * 9 * 2 and all(count == int(count) for count in counts)
    for name, value in trained.items():
        unused = [j for j, count in enumerate(counts) if count == 0]
        np.testing.assert_array_equal(value[unused], start[name][unused], err_msg=name)


def test_a_one_bit_pool_is_a_pool_of_quantised_elements(tiny_vit: Path) -> None:
    pool, plain = attached(tiny_vit, one_bit=True), attached(tiny_vit)
    inside = dict(plain.module.named_parameters())
    with torch.no_grad():
        for name, value in pool.parameters().items():
            inside[plain.trainable[name]].copy_(value)
        latent = pool.module.parts(pool.parameters()["pool"])
        for part, used in zip(latent, plain.module.parts(inside["pool"]), strict=True):
            used.copy_(torch.stack([one_bit(row[None])[0] for row in part]))
            assert all(len(set(row.tolist())) == 2 for row in used), "one bit a value"
        found = pool.module(pixel_values=pixels()).logits
        torch.testing.assert_close(found, plain.module(pixel_values=pixels()).logits)
        folded = fold_element(pool.module, 2)(pixel_values=pixels()).logits
        expected = fold_element(plain.module, 2)(pixel_values=pixels()).logits
    torch.testing.assert_close(folded, expected, rtol=0, atol=1e-5)
    with pytest.raises(MethodError, match="init_std is 0; it must be above 0"):
        attached(tiny_vit, one_bit=True, init_std=0.0)
    with pytest.raises(MethodError, match="one_bit is 1; expected true or false"):
        attached(tiny_vit, one_bit=1)


@given(
    st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=1, max_size=4),
    st.integers(1, 6),
)
def test_leading_are_the_largest_and_of_equal_ones_the_first(
    rows: list[list[int]], count: int
) -> None:
    found = leading(torch.tensor(rows, dtype=torch.float32), count)
    for row, mask in zip(rows, found.tolist(), strict=True):
        expected = sorted(range(6), key=lambda j: (-row[j], j))[:count]
        assert [j for j in range(6) if mask[j]] == sorted(expected)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"elements": 0}, "method.elements is 0; it must be at least 1"),
        ({"selected": 7}, "method.selected is 7; it must be from 1 to method.elements = 6"),
        ({"selected": 0}, "method.selected is 0"),
        ({"key_weight": 1.0}, r"method.key_weight is 1.0; it must be in \[0, 1\)"),
        ({"init_std": -0.1}, "method.init_std"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(MethodError, match=words):
        method_named("fedins", {"elements": 6, "selected": 2, **settings})


def test_start_is_drawn_as_the_released_code_does(tiny_vit: Path) -> None:
    pool = attached(tiny_vit, elements=25, selected=3, init_std=0.02).module
    assert isinstance(pool, InstancePool)
    assert float(pool.keys.detach().std()) == pytest.approx(0.02, rel=0.15)
    assert float(pool.pool.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert not pool.bias.any() and float(pool.weight.detach().std()) == pytest.approx(
        (2 / 16) ** 0.5, rel=0.1
    )
