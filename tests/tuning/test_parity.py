# SPDX-License-Identifier: Apache-2.0
"""Every method, compiled, against torch's autograd and optimizers: the same figures to 1e-5."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edge_runtime import batch_plan
from edge_runtime.trainer import OnnxTrainer, initial_state
from edge_runtime.training_loop import TrainingLoop, batch_of

METHODS = (
    "full", "head", "lora", "lora-sb", "ssf", "adapter", "one-bit-adapter", "one-bit-lora",
    "prompt", "peft:LOHA", "peft:IA3", "peft:LOKR", "peft:OFT", "peft:FOURIERFT",
)  # fmt: skip
CASES = [
    *((method, "image", "sgd") for method in METHODS),
    *((method, "image", "adamw") for method in ("full", "lora", "ssf", "one-bit-adapter")),
    *((method, "text", "adamw") for method in ("head", "lora", "ssf", "adapter", "prompt")),
]
# Softmax does not see what is added to every score: the true gradient is zero, the computed one is
# rounding, and Adam divides it by itself.
SHIFTS_NOTHING = ("k_proj.bias", "k_proj.shift", "self.key.bias", "self.key.shift")
SAMPLES, EPOCHS = 10, 2  # 3 steps an epoch, the last of 2 samples
RATE = {"sgd": 0.05, "adamw": 0.002}


def batches_of(seed: int) -> tuple[np.ndarray, np.ndarray]:
    return batch_plan(SAMPLES, 4, EPOCHS, np.random.default_rng(seed))


@pytest.mark.parametrize(("method", "kind", "optimizer"), CASES)
def test_compiled_steps_equal_autograd_when_batches_are_ragged(
    make_tuned: Callable[..., Any],
    train_plainly: Callable[..., Any],
    method: str,
    kind: str,
    optimizer: str,
) -> None:
    made = make_tuned(method, kind=kind, optimizer=optimizer)
    start, data = made.start(), made.data(SAMPLES)
    indices, weights = batches_of(3)
    names = [name for name, _ in made.bundle.manifest.inputs]
    steps = (
        {**batch_of(data, names, rows), "weight": weight}
        for rows, weight in zip(indices, weights, strict=True)
    )
    trained, losses, _ = TrainingLoop(made.bundle.path("train"), threads=1).run(
        start, initial_state(made.bundle.manifest, made.start()), steps, RATE[optimizer]
    )

    unpadded = [rows[weight > 0] for rows, weight in zip(indices, weights, strict=True)]
    assert [len(rows) for rows in unpadded] == [4, 4, 2] * EPOCHS
    expected, expected_losses = train_plainly(made.recipe, start, data, unpadded, RATE[optimizer])
    np.testing.assert_allclose(losses, expected_losses, rtol=0, atol=1e-5)
    assert trained.keys() == expected.keys()
    for name, value in trained.items():
        if optimizer == "adamw" and name.endswith(SHIFTS_NOTHING):
            continue
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-5, err_msg=name)
    # The comparison is worth something only where training has changed something.
    moved = {
        name: float(np.abs(trained[name] - start[name]).max())
        for name in start
        if not name.endswith(SHIFTS_NOTHING)
    }
    assert min(moved.values()) > 1e-4, moved


@pytest.mark.parametrize("kind", ["image", "text"])
def test_padding_changes_nothing_when_its_samples_are_others(
    make_tuned: Callable[..., Any], kind: str
) -> None:
    made = make_tuned("lora", kind=kind, optimizer="sgd" if kind == "image" else "adamw")
    data = made.data(6)
    names = [name for name, _ in made.bundle.manifest.inputs]
    loop = TrainingLoop(made.bundle.path("train"), threads=1)
    results = []
    for padding in (0, 5):
        rows = np.array([2, 3, padding, padding])
        step = {**batch_of(data, names, rows), "weight": np.array([1, 1, 0, 0], np.float32)}
        results.append(
            loop.run(made.start(), initial_state(made.bundle.manifest, made.start()), [step], 0.1)
        )
    for name, value in results[0][0].items():
        np.testing.assert_allclose(value, results[1][0][name], rtol=0, atol=1e-7)
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "kind", "optimizer"),
    [
        *((method, "image", "sgd") for method in METHODS),
        *((method, "text", "adamw") for method in ("head", "lora", "ssf", "adapter", "prompt")),
    ],
)
def test_evaluation_equals_the_unfolded_network(
    make_tuned: Callable[..., Any],
    logits_of: Callable[..., np.ndarray],
    method: str,
    kind: str,
    optimizer: str,
) -> None:
    made = make_tuned(method, kind=kind, optimizer=optimizer)
    tensors, data = made.start(), made.data(7)
    losses, correct = OnnxTrainer(made.bundle, threads=1).evaluate_samples(tensors, data)
    scores = logits_of(made.recipe, tensors, data).astype(np.float64)
    rows = np.arange(7)
    expected = np.log(np.exp(scores).sum(axis=1)) - scores[rows, data["labels"]]
    np.testing.assert_allclose(losses, expected, rtol=0, atol=2e-5)
    np.testing.assert_array_equal(correct, scores.argmax(axis=1) == data["labels"])
