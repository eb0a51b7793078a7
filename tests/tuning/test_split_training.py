# SPDX-License-Identifier: Apache-2.0
"""The device's side through a body in the same process, by way of the messages of a stream."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client_sdk.split_body import RemoteBody
from coordinator.onnx_body import OnnxBody
from edge_runtime.batches import batch_plan
from edge_runtime.errors import TrainingError
from edge_runtime.split_trainer import SplitTrainer, chosen, kept_count, noised
from simulations.backends.split import local_body
from tuning.split_body import TorchBody

Make = Callable[..., Any]
ENGINES = ("torch", "onnx")
ROWS = 64


def body_of(made: Any, engine: str) -> RemoteBody:
    """The body in this process, through the same bytes as over a stream."""
    kind = TorchBody(made.tuned) if engine == "torch" else OnnxBody(made.split.server, threads=1)
    return local_body(kind, made.bundle.manifest.split, most_rows=ROWS)


def fitted(made: Any, engine: str, samples: int = 10, *, lanes: int = 1, **options: Any) -> Any:
    bodies = [body_of(made, engine) for _ in range(lanes)]
    trainer = SplitTrainer(made.bundle, *bodies, threads=1)
    given = {"learning_rate": 0.05, "epochs": 2, "seed": 3, **options}
    return trainer.fit(made.start(size=0.1), made.data(samples), **given)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("cut", "kind", "optimizer"), [
    ("1+0", "image", "sgd"),
    ("faithful-minimal", "image", "adamw"),
    ("1+0", "text", "adamw"),
], ids=str)  # fmt: skip
def test_training_through_the_body_is_training_of_the_whole_network(
    make_split: Make, train_plainly: Callable[..., Any], cut: str, kind: str, optimizer: str,
    engine: str,
) -> None:  # fmt: skip
    made = make_split(cut, kind=kind, optimizer=optimizer)
    rate = 0.05 if optimizer == "sgd" else 0.01
    found, metrics = fitted(made, engine, learning_rate=rate)
    data = made.data(10)
    order, weights = batch_plan(10, 4, 2, np.random.default_rng(3))
    batches = [rows[weight > 0] for rows, weight in zip(order, weights, strict=True)]
    expected, losses = train_plainly(made.recipe, made.start(size=0.1), data, batches, rate)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=2e-5, err_msg=name)
    sizes = [len(rows) for rows in batches]
    mean = sum(loss * size for loss, size in zip(losses, sizes, strict=True)) / sum(sizes)
    assert metrics == {"loss": pytest.approx(mean, abs=1e-5), "kept": 10.0}


@pytest.mark.parametrize("engine", ENGINES)
def test_evaluation_is_that_of_the_whole_network(
    make_split: Make, logits_of: Callable[..., np.ndarray], engine: str
) -> None:
    made = make_split("1+0", kind="text", optimizer="adamw")
    data, start = made.data(70), made.start(size=0.1)
    trainer = SplitTrainer(made.bundle, body_of(made, engine), threads=1)
    found = trainer.evaluate(start, data)
    logits = logits_of(made.recipe, start, data)
    assert found["accuracy"] == pytest.approx(float((logits.argmax(1) == data["labels"]).mean()))
    shifted = logits - logits.max(axis=1, keepdims=True)
    entropies = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(70), data["labels"]]
    assert found["loss"] == pytest.approx(float(entropies.mean()), abs=1e-5)


@pytest.mark.parametrize(("kind", "lanes"), [("image", 2), ("text", 3), ("image", 8)])
def test_lanes_change_nothing_but_who_waits(make_split: Make, kind: str, lanes: int) -> None:
    made = make_split("1+0", kind=kind, optimizer="sgd" if kind == "image" else "adamw")
    # Batches of four, and one of two at the end: some lanes have nothing to carry.
    one, first = fitted(made, "onnx")
    several, second = fitted(made, "onnx", lanes=lanes)
    for name, value in one.items():
        np.testing.assert_allclose(several[name], value, rtol=0, atol=1e-5, err_msg=name)
    assert second == pytest.approx(first, abs=1e-5)
    bodies = [body_of(made, "onnx") for _ in range(lanes)]
    trainer = SplitTrainer(made.bundle, *bodies, threads=1)
    assert trainer.evaluate(one, made.data(5)) == pytest.approx(
        trainer.through(bodies[0]).evaluate(one, made.data(5)), abs=1e-5
    )
    assert [body.sent_bytes > 0 for body in bodies] == [place < 5 for place in range(lanes)]


def test_noise_is_the_same_on_any_lanes(make_split: Make) -> None:
    made = make_split("1+0", noise=0.5)
    one, several = (fitted(made, "onnx", lanes=lanes)[0] for lanes in (1, 3))
    for name, value in one.items():
        np.testing.assert_allclose(several[name], value, rtol=0, atol=1e-5, err_msg=name)


def test_phases_leave_out_samples_and_train_without_the_body(make_split: Make) -> None:
    plain = make_split("1+0")
    halved = make_split("1+0", keep=0.5)
    warmed = make_split("1+0", keep=0.5, local_epochs=2)
    calls = {}
    results = {}
    for name, made in (("plain", plain), ("halved", halved), ("warmed", warmed)):
        body = body_of(made, "onnx")
        trainer = SplitTrainer(made.bundle, body, threads=1)
        results[name] = trainer.fit(
            made.start(size=0.1), made.data(12), learning_rate=0.05, epochs=1, seed=3
        )
        calls[name] = body.sent_bytes
    assert [results[name][1]["kept"] for name in results] == [12.0, 6.0, 6.0]
    # What only fills up a batch does not travel, and local passes send nothing.
    assert calls["halved"] == pytest.approx(calls["plain"] / 2, rel=0.05)
    assert calls["warmed"] == calls["halved"]
    prompt = "vit.embeddings.prompt"
    assert not np.array_equal(results["warmed"][0][prompt], results["halved"][0][prompt])


def test_a_copy_learns_without_the_body_before_it_scores(
    make_split: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[np.ndarray] = []

    def choosing(scores: np.ndarray, keep: float, drop: float) -> np.ndarray:
        judged.append(scores)
        return np.arange(kept_count(len(scores), keep, drop))

    monkeypatch.setattr("edge_runtime.split_trainer.chosen", choosing)
    learned, plain = (make_split("1+0", keep=0.5, scoring_epochs=count) for count in (3, 0))
    found, again = fitted(learned, "onnx"), fitted(plain, "onnx")
    trainer = SplitTrainer(plain.bundle, body_of(plain, "onnx"), threads=1)
    came = trainer.scores(plain.start(size=0.1), plain.data(10))
    np.testing.assert_allclose(judged[1], came, rtol=0, atol=1e-6)
    assert judged[0].mean() < judged[1].mean() - 0.01, "the copy makes fewer mistakes"
    for name, value in again[0].items():
        assert np.array_equal(found[0][name], value), "of the copy nothing is left"


def test_the_kept_are_those_with_the_highest_scores(make_split: Make) -> None:
    made = make_split("1+0")
    trainer = SplitTrainer(made.bundle, body_of(made, "onnx"), threads=1)
    scores = trainer.scores(made.start(size=0.1), made.data(20))
    assert scores.shape == (20,) and scores.dtype == np.float32
    assert scores.min() >= 0 and scores.max() <= math.sqrt(2) + 1e-6
    assert scores.std() > 0.01
    rows = chosen(scores, 0.25, 0.1)
    order = sorted(range(20), key=lambda row: -scores[row])
    assert rows.tolist() == sorted(order[2:7])  # two left out, a quarter of eighteen kept


@given(
    scores=st.lists(st.floats(0, 1.5, width=32), min_size=1, max_size=30),
    keep=st.floats(0.01, 1.0),
    drop=st.floats(0.0, 0.99),
)
def test_at_least_one_sample_is_kept(scores: list[float], keep: float, drop: float) -> None:
    rows = chosen(np.array(scores, np.float32), keep, drop)
    rest = len(scores) - math.floor(drop * len(scores))
    assert len(rows) == math.ceil(keep * rest) >= 1
    assert len(set(rows.tolist())) == len(rows)


def test_frozen_tensors_stay(make_split: Make) -> None:
    made = make_split("1+0")
    held = ("vit.embeddings.prompt", "classifier.bias")
    found, _ = fitted(made, "onnx", frozen=held)
    start = made.start(size=0.1)
    for name, value in start.items():
        assert np.array_equal(found[name], value) is (name in held), name


def test_what_a_split_network_has_no_place_for_is_refused(
    make_split: Make, make_bundle: Make
) -> None:
    made = make_split("1+0")
    with pytest.raises(TrainingError, match="without corrections and offsets"):
        fitted(made, "onnx", offset={"vit.layernorm.weight": np.zeros(16, np.float32)})
    with pytest.raises(TrainingError, match="expected one of a split network"):
        SplitTrainer(make_bundle("lora").bundle, body_of(made, "onnx"))


@pytest.mark.parametrize("form", ["float16", "int8"])
def test_smaller_forms_train_nearly_alike(make_split: Make, form: str) -> None:
    whole, small = make_split("1+0"), make_split("1+0", form=form)
    one, other = fitted(whole, "onnx")[0], fitted(small, "onnx")[0]
    for name, value in one.items():
        moved = np.abs(value - whole.start(size=0.1)[name]).max()
        assert 0 < np.abs(other[name] - value).max() < 0.1 * moved, name


def test_noise_is_of_a_share_of_each_token() -> None:
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((3, 5, 4000)).astype(np.float32) * [[[1], [2], [3], [4], [5]]]
    noise = rng.standard_normal(hidden.shape)
    found = noised(hidden, 0.5, noise) - hidden
    for token in range(5):
        assert found[:, token].std() == pytest.approx(0.5 * (token + 1), rel=0.05)


def test_noise_changes_what_is_learned_and_is_drawn_from_the_seed(make_split: Make) -> None:
    plain, noisy = make_split("1+0"), make_split("1+0", noise=0.5)
    one, other = fitted(plain, "onnx")[0], fitted(noisy, "onnx")[0]
    again = fitted(noisy, "onnx")[0]
    for name, value in one.items():
        assert not np.array_equal(other[name], value), name
        assert np.array_equal(other[name], again[name]), "the seed decides the noise"


def test_no_weight_of_the_body_is_on_the_device(make_split: Make) -> None:
    from safetensors.numpy import load_file

    made = make_split("1+0")
    device = set(load_file(made.bundle.folder / "backbone.safetensors"))
    device |= set(load_file(made.bundle.folder / "initial.safetensors"))
    body = set(load_file(made.split.server / "backbone.safetensors"))
    assert body and all(name.startswith("vit.layers.1.") for name in body)
    assert not any(name.startswith("vit.layers.1.") for name in device)
