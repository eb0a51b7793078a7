# SPDX-License-Identifier: Apache-2.0
"""A bundle trained and evaluated by onnxruntime; parity with torch is in tests/tuning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edge_runtime import DataError, TrainingError, batch_plan
from edge_runtime.session import open_session
from edge_runtime.trainer import OnnxTrainer, check_data, initial_state, mean_loss, rounded
from edge_runtime.training_loop import TrainingLoop, batch_of


def test_fit_runs_the_plan_of_its_seed(make_bundle: Callable[..., Any]) -> None:
    made = make_bundle("head")
    data, start = made.data(10), made.start()
    trained, metrics = OnnxTrainer(made.bundle, threads=1).fit(
        start, data, learning_rate=0.05, epochs=2, seed=42
    )
    indices, weights = batch_plan(10, 4, 2, np.random.default_rng(42))
    names = [name for name, _ in made.bundle.manifest.inputs]
    expected, losses, _ = TrainingLoop(made.bundle.path("train"), threads=1).run(
        start,
        initial_state(made.bundle.manifest, made.start()),
        [
            {**batch_of(data, names, rows), "weight": weight}
            for rows, weight in zip(indices, weights, strict=True)
        ],
        0.05,
    )
    for name, value in trained.items():
        assert value.tobytes() == expected[name].tobytes()
    counts = np.array([4, 4, 2, 4, 4, 2])
    assert metrics == {"loss": pytest.approx(float((losses * counts).sum() / 20), rel=1e-5)}


def test_fit_is_decided_by_seed_and_epochs(make_bundle: Callable[..., Any]) -> None:
    made = make_bundle("head")
    trainer, data = OnnxTrainer(made.bundle, threads=1), made.data(9)

    def bits(*, seed: int, epochs: int) -> bytes:
        trained, _ = trainer.fit(made.start(), data, learning_rate=0.05, epochs=epochs, seed=seed)
        return b"".join(trained[name].tobytes() for name in sorted(trained))

    first = bits(seed=1, epochs=1)
    assert bits(seed=1, epochs=1) == first
    assert bits(seed=2, epochs=1) != first
    assert bits(seed=1, epochs=2) != first


def test_training_lowers_the_loss(make_bundle: Callable[..., Any]) -> None:
    made = make_bundle("lora")
    trainer, data = OnnxTrainer(made.bundle, threads=1), made.data(12)
    start = made.bundle.initial()
    trained, _ = trainer.fit(start, data, learning_rate=0.02, epochs=20, seed=0)
    assert trainer.evaluate(trained, data)["loss"] < 0.7 * trainer.evaluate(start, data)["loss"]


@pytest.mark.parametrize("samples", [1, 64, 65, 130])
def test_evaluate_equals_a_numpy_oracle_at_any_count(
    make_bundle: Callable[..., Any], samples: int
) -> None:
    made = make_bundle("head")
    data, tensors = made.data(samples), made.bundle.initial()
    # predict.onnx is another graph of the same network, with the initial tensors folded in
    session = open_session(made.bundle.path("predict"), 1)
    (scores,) = session.run(["logits"], {"batch/pixel_values": data["pixel_values"]})
    scores = scores.astype(np.float64)
    shifted = scores - scores.max(axis=1, keepdims=True)
    chosen = shifted[np.arange(samples), data["labels"]]
    expected = np.log(np.exp(shifted).sum(axis=1)) - chosen
    trainer = OnnxTrainer(made.bundle, threads=1)
    losses, correct = trainer.evaluate_samples(tensors, data)
    assert losses.dtype == correct.dtype == np.float32
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(correct, scores.argmax(axis=1) == data["labels"])
    assert trainer.evaluate(tensors, data) == {
        "loss": pytest.approx(expected.mean(), abs=1e-5),
        "accuracy": pytest.approx(correct.mean(), abs=1e-6),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "no labels"),
        ({"labels": np.zeros(0, np.int64)}, "no samples"),
        ({"labels": np.zeros(3, np.int32)}, r"expected int64 \[samples\], found int32"),
        ({"labels": np.zeros((3, 1), np.int64)}, r"expected int64 \[samples\], found int64"),
        ({"labels": np.array([0, 10, 1])}, r"expected 0 to 9 \(10 classes\), found 0 to 10"),
        ({"labels": np.array([0, -1, 1])}, "found -1 to 1"),
        ({"pixel_values": None}, r'input "pixel_values" is missing; the bundle reads float32'),
        (
            {"pixel_values": np.zeros((3, 1, 8, 8), np.float64)},
            r"expected float32 \[3, 1, 8, 8\], found float64",
        ),
        (
            {"pixel_values": np.zeros((3, 1, 9, 8), np.float32)},
            r"found float32 \[3, 1, 9, 8\]",
        ),
        (
            {"pixel_values": np.zeros((2, 1, 8, 8), np.float32)},
            r"expected float32 \[3, 1, 8, 8\], found float32 \[2, 1, 8, 8\]",
        ),
    ],
)
def test_data_that_do_not_fit_are_refused(
    make_bundle: Callable[..., Any], change: dict[str, np.ndarray | None], message: str
) -> None:
    made = make_bundle("head")
    data = {name: value for name, value in (made.data(3) | change).items() if value is not None}
    trainer = OnnxTrainer(made.bundle, threads=1)
    with pytest.raises(DataError, match=message):
        trainer.fit(made.start(), data, learning_rate=0.1, epochs=1, seed=0)
    with pytest.raises(DataError, match=message):
        trainer.evaluate(made.start(), data)


def test_other_arrays_of_a_client_are_let_be(make_bundle: Callable[..., Any]) -> None:
    made = make_bundle("head")
    assert check_data(made.bundle.manifest, {**made.data(3), "notes": np.zeros(7)}) == 3


def test_loss_that_is_not_a_number_ends_the_training(make_bundle: Callable[..., Any]) -> None:
    made = make_bundle("head")
    data = made.data(6)
    data["pixel_values"][2] = np.nan
    trainer = OnnxTrainer(made.bundle, threads=1)
    with pytest.raises(TrainingError, match="loss became nan; lower the learning rate"):
        trainer.fit(made.start(), data, learning_rate=0.1, epochs=1, seed=0)


def test_mean_loss_counts_samples_not_steps() -> None:
    weights = np.array([[1, 1, 1], [1, 0, 0]], np.float32)
    assert mean_loss(np.array([1.0, 5.0], np.float32), weights) == 2.0
    with pytest.raises(TrainingError, match="inf"):
        mean_loss(np.array([1.0, np.inf], np.float32), weights)


@pytest.mark.parametrize(
    ("value", "expected"), [(0.12345678, 0.123457), (1234567.0, 1234570.0), (0.0, 0.0)]
)
def test_metrics_have_six_digits(value: float, expected: float) -> None:
    assert rounded(value) == expected
