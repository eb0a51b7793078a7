# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from coordinator.sections import AggregationSection, TrainingSection
from edge_runtime import batch_plan
from edge_runtime.trainer import OnnxTrainer
from tuning.torch_trainer import TorchTrainer


@pytest.mark.parametrize(
    ("method", "kind", "optimizer"),
    [
        ("lora", "image", "sgd"),
        ("ssf", "image", "sgd"),
        ("prompt", "text", "adamw"),
    ],
)
def test_torch_equals_onnxruntime(
    make_bundle: Callable[..., Any], method: str, kind: str, optimizer: str
) -> None:
    made = make_bundle(method, kind=kind, optimizer=optimizer)
    _, tuned = made.recipe.build()
    by_torch = TorchTrainer(tuned, made.recipe.training, batch_plan=batch_plan)
    by_onnx = OnnxTrainer(made.bundle, threads=1)
    start, data = made.start(), made.data(11)
    rate = 0.05 if optimizer == "sgd" else 0.002
    found, metrics = by_torch.fit(start, data, learning_rate=rate, epochs=2, seed=6)
    expected, expected_metrics = by_onnx.fit(start, data, learning_rate=rate, epochs=2, seed=6)
    assert metrics == pytest.approx(expected_metrics, abs=1e-5)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5, err_msg=name)
    evaluated = by_torch.evaluate(found, data)
    assert evaluated == pytest.approx(by_onnx.evaluate(expected, data), abs=1e-4)
    losses, correct = by_torch.evaluate_samples(found, data)
    assert losses.shape == correct.shape == (11,)


def test_torch_equals_onnxruntime_when_clients_are_held_near_the_start(
    make_bundle: Callable[..., Any],
) -> None:
    training = TrainingSection(learning_rate=0.05, batch_size=4, proximal=5.0)
    made, free = make_bundle("lora", training=training), make_bundle("lora")
    _, tuned = made.recipe.build()
    by_torch = TorchTrainer(tuned, made.recipe.training, batch_plan=batch_plan)
    start, data = made.start(), made.data(11)
    options = {"learning_rate": 0.05, "epochs": 2, "seed": 6}
    found, _ = by_torch.fit(start, data, **options)
    expected, _ = OnnxTrainer(made.bundle, threads=1).fit(start, data, **options)
    unheld, _ = OnnxTrainer(free.bundle, threads=1).fit(start, data, **options)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5, err_msg=name)

    def moved(tensors: Mapping[str, np.ndarray]) -> float:
        return sum(float(np.square(value - start[name]).sum()) for name, value in tensors.items())

    assert moved(expected) < moved(unheld)


def test_torch_equals_onnxruntime_with_corrections_and_moved_weights(
    make_bundle: Callable[..., Any],
) -> None:
    training = TrainingSection(learning_rate=0.05, batch_size=4, scaffold=True)
    uniform = AggregationSection(weighting="uniform")
    made = make_bundle("lora", training=training, aggregation=uniform)
    _, tuned = made.recipe.build()
    by_torch = TorchTrainer(tuned, made.recipe.training, batch_plan=batch_plan)
    by_onnx = OnnxTrainer(made.bundle, threads=1)
    start, data = made.start(), made.data(11)
    rng = np.random.default_rng(3)
    correction = {
        name: 0.1 * rng.standard_normal(value.shape).astype("f4") for name, value in start.items()
    }
    offset = {
        pair.base: 0.1
        * rng.standard_normal((start[pair.up].shape[0], start[pair.down].shape[1])).astype("f4")
        for pair in made.bundle.manifest.pairs
    }
    options = {"learning_rate": 0.05, "epochs": 2, "seed": 6}
    plain, _ = by_torch.fit(start, data, **options)
    for extra in ({"correction": correction}, {"offset": offset}):
        found, metrics = by_torch.fit(start, data, **options, **extra)
        expected, expected_metrics = by_onnx.fit(start, data, **options, **extra)
        assert metrics == pytest.approx(expected_metrics, abs=1e-5)
        assert any(np.abs(found[name] - plain[name]).max() > 1e-3 for name in plain)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5, err_msg=name)
    evaluated = by_torch.evaluate(plain, data, offset=offset)
    assert evaluated == pytest.approx(by_onnx.evaluate(plain, data, offset=offset), abs=1e-4)
    # What was moved for one call is where it was in the next.
    again, _ = by_torch.fit(start, data, **options)
    assert all(value.tobytes() == plain[name].tobytes() for name, value in again.items())


def test_every_fit_starts_from_the_tensors_it_is_given(make_bundle: Callable[..., Any]) -> None:
    made = make_bundle("head")
    _, tuned = made.recipe.build()
    trainer = TorchTrainer(tuned, made.recipe.training, batch_plan=batch_plan)
    start, data = made.start(), made.data(6)
    kept = {name: value.copy() for name, value in start.items()}
    first, _ = trainer.fit(start, data, learning_rate=0.1, epochs=1, seed=0)
    trainer.fit(first, data, learning_rate=0.1, epochs=3, seed=1)
    again, _ = trainer.fit(start, data, learning_rate=0.1, epochs=1, seed=0)
    for name, value in first.items():
        assert value.tobytes() == again[name].tobytes()
        assert start[name].tobytes() == kept[name].tobytes()
