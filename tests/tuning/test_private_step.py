# SPDX-License-Identifier: Apache-2.0
"""The private step against a loop over single samples, and what one sample can do to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.bundles import recipe_of
from edge_runtime.errors import TrainingError
from edge_runtime.keystream import repeatable_keystream
from edge_runtime.private_batches import private_batches
from edge_runtime.trainer import OnnxTrainer, initial_state
from edge_runtime.training_loop import TrainingLoop
from protocol.manifest import ANCHOR
from simulations.benchmarks.dp_sgd import literal_steps
from tuning import graphs
from tuning.ports import step_examples, step_graph
from tuning.private_step import clipped_sum, private_step
from tuning.step import initial_state as initial_tensors
from tuning.torch_private import counted_values, fit_privately

SAMPLES, BATCH, CLIP = 10, 4, 0.5


def calls_of(made: Any, data: dict[str, np.ndarray], seed: int = 0) -> list[dict[str, np.ndarray]]:
    manifest = made.bundle.manifest
    drawn = private_batches(len(data["labels"]), manifest.training, repeatable_keystream(seed))
    return list(drawn.calls(data, [name for name, _ in manifest.inputs], manifest.trainable.size))


def by_name(flat: np.ndarray, start: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A vector of all values as tensors."""
    ends = np.cumsum([start[name].size for name in sorted(start)])
    parts = np.split(flat, ends[:-1])
    named = zip(sorted(start), parts, strict=True)
    return {name: part.reshape(start[name].shape) for name, part in named}


def run(
    made: Any, calls: list[dict[str, np.ndarray]], rate: float = 0.05, frozen: Any = ()
) -> dict[str, np.ndarray]:
    loop = TrainingLoop(made.bundle.path("train"), threads=1)
    state = initial_state(made.bundle.manifest, made.start())
    return loop.run(made.start(), state, calls, rate, frozen=frozen)[0]


@pytest.fixture(scope="module")
def lora(make_bundle: Callable[..., Any], private_options: Callable[..., Any]) -> Any:
    """Momentum, weight decay, FedProx's pull."""
    return make_bundle("lora", **private_options(steps=10))


def test_compiled_steps_equal_a_loop_over_samples(lora: Any) -> None:
    spec = lora.recipe.training
    start, calls = lora.start(), calls_of(lora, lora.data(SAMPLES))
    # Some draws take several calls.
    assert len(calls) > 10 == sum(int(call["applies"]) for call in calls)
    found = run(lora, calls, spec.learning_rate)
    expected = literal_steps(lora.recipe.build()[1], spec, start, calls)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5, err_msg=name)
        assert float(np.abs(found[name] - start[name]).max()) > 1e-3, name
    # Neither the clipping nor the noise is too small to be seen.
    unclipped = literal_steps(
        lora.recipe.build()[1], _with(spec, clip=1e3, noise_multiplier=CLIP / 500), start, calls
    )
    silent = literal_steps(
        lora.recipe.build()[1], _with(spec, clip=CLIP, noise_multiplier=1e-9), start, calls
    )
    for other in (unclipped, silent):
        assert max(float(np.abs(other[n] - expected[n]).max()) for n in expected) > 1e-2


def _with(spec: Any, **privacy: float) -> Any:
    return replace(spec, privacy=replace(spec.privacy, **privacy))


@pytest.mark.parametrize(
    ("method", "settings"),
    [("ssf", {}), ("fedins", {"elements": 3, "selected": 2}), ("one-bit-adapter", {})],
)
def test_steps_of_other_methods_equal_a_loop_over_samples(
    tiny_job: Callable[..., Any],
    private_options: Callable[..., Any],
    method: str,
    settings: dict[str, Any],
) -> None:
    case = Case.of(tiny_job(method, settings=settings, **private_options(optimizer="adamw")))
    trained, _ = fit_privately(
        case.tuned, case.spec, {n: torch.from_numpy(v) for n, v in case.start.items()}, case.calls,
        learning_rate=case.spec.learning_rate, left=(), device=torch.device("cpu"),
    )  # fmt: skip
    case.compare({name: value.numpy() for name, value in trained.items()})


def test_exported_step_of_texts_equals_a_loop_over_samples(
    tiny_job: Callable[..., Any], private_options: Callable[..., Any], tmp_path: Path
) -> None:
    # The graph of the step alone, whose frozen weights are inputs: the rest of a bundle is tested
    # elsewhere, and takes as long again to compile.
    job = tiny_job("lora", **private_options(kind="text", optimizer="adamw"))
    case = Case.of(job)
    step = private_step(case.tuned, case.spec)
    graphs.save_model(step_graph(case.tuned, step, case.examples), tmp_path / "train.onnx")
    frozen = {f"frozen/{n}": value.numpy().copy() for n, value in case.tuned.frozen().items()}
    state = {n: value.numpy() for n, value in initial_tensors(case.tuned, case.spec).items()}
    state |= {ANCHOR + name: value for name, value in case.start.items()}
    calls = [frozen | call for call in case.calls]
    loop = TrainingLoop(tmp_path / "train.onnx", threads=1)
    case.compare(loop.run(case.start, state, calls, case.spec.learning_rate)[0])


@dataclass(frozen=True, kw_only=True)
class Case:
    """A tiny private job that is not compiled, with calls that it is to make."""

    tuned: Any
    spec: Any
    examples: dict[str, torch.Tensor]
    start: dict[str, np.ndarray]
    calls: list[dict[str, np.ndarray]]

    @classmethod
    def of(cls, job: Any) -> Case:
        recipe = recipe_of(job, 3)
        backbone, tuned = recipe.build()
        rng = np.random.default_rng(4)
        start = {
            name: value.numpy() + np.float32(0.3) * rng.standard_normal(value.shape, np.float32)
            for name, value in tuned.parameters().items()
        }
        with torch.no_grad():
            for name, parameter in tuned.module.named_parameters():
                for public in (own for own, inside in tuned.trainable.items() if inside == name):
                    parameter.copy_(torch.from_numpy(start[public]))
        examples = step_examples(backbone, tuned, recipe)
        data = {
            name.removeprefix("batch/"): _some(rng, value)
            for name, value in examples.items()
            if name.startswith("batch/")
        }
        names = list(data)
        data["labels"] = rng.integers(0, 3, SAMPLES)
        drawn = private_batches(SAMPLES, recipe.training, repeatable_keystream(2))
        values = sum(value.size for value in start.values())
        calls = list(drawn.calls(data, names, values))
        return cls(tuned=tuned, spec=recipe.training, examples=examples, start=start, calls=calls)

    def compare(self, found: dict[str, np.ndarray]) -> None:
        expected = literal_steps(self.tuned, self.spec, self.start, self.calls)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5, err_msg=name)
            assert float(np.abs(found[name] - self.start[name]).max()) > 1e-3, name


def _some(rng: np.random.Generator, example: torch.Tensor) -> np.ndarray:
    """Samples of an input: words, attention masks that hide some, or pixels."""
    shape = (SAMPLES, *example.shape[1:])
    if example.dtype == torch.int64:
        return rng.integers(4, 14, shape)
    values = rng.standard_normal(shape).astype(np.float32)
    is_mask = shape[1:3] == (1, 1)
    return np.where(values > 1, np.float32(-1e4), np.float32(0)) if is_mask else values


def test_step_without_samples_is_the_noise_at_its_scale(lora: Any) -> None:
    start = lora.start()
    rng = np.random.default_rng(0)
    flat = rng.standard_normal(lora.bundle.manifest.trainable.size, np.float32)
    noise = by_name(flat, start)
    call = calls_of(lora, lora.data(SAMPLES))[0] | {
        "weight": np.zeros(BATCH, np.float32),
        "applies": np.float32(1),
        "noise": flat,
    }
    found = run(lora, [call], 1.0)
    for name, value in found.items():
        # Weight decay is 0.01; the first step of momentum and of the pull is as if without.
        expected = start[name] - 2.0 * CLIP / BATCH * noise[name] - 0.01 * start[name]
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-6)


def test_call_that_does_not_apply_changes_no_tensor_and_keeps_its_sum(lora: Any) -> None:
    data = lora.data(SAMPLES)
    first, second = (
        calls_of(lora, data)[0] | {"weight": np.array(weight, np.float32), "applies": np.float32(0)}
        for weight in ([1, 1, 0, 0], [0, 0, 1, 1])
    )
    for name, value in run(lora, [first, second]).items():
        assert value.tobytes() == lora.start()[name].tobytes()
    applied = second | {"applies": np.float32(1)}
    together = applied | {"weight": np.ones(BATCH, np.float32)}
    parted, whole = run(lora, [first, applied]), run(lora, [together])
    for name, value in whole.items():
        np.testing.assert_allclose(parted[name], value, rtol=0, atol=1e-6)
        assert np.abs(value - lora.start()[name]).max() > 1e-4


def test_tensors_that_are_left_as_they_are_use_up_no_norm(lora: Any) -> None:
    # All but the classifier left: the step is that of a job that trains the classifier alone.
    data, start = lora.data(SAMPLES), lora.start()
    calls = calls_of(lora, data)[:1]
    left = {name for name in start if not name.startswith("classifier")}
    found = run(lora, calls, frozen=left)
    assert {name for name in start if found[name].tobytes() == start[name].tobytes()} == left
    _, tuned = lora.recipe.build()
    batch = {"pixel_values": torch.from_numpy(calls[0]["batch/pixel_values"])}
    tensors = {name: torch.from_numpy(value) for name, value in start.items()}
    counted = counted_values({name: value.size for name, value in start.items()}, left)
    weight = torch.from_numpy(calls[0]["weight"])
    flat, _ = clipped_sum(
        tuned, CLIP, tensors, tuned.frozen(), batch, torch.from_numpy(calls[0]["labels"]),
        weight, counted,
    )  # fmt: skip
    added, noise = by_name(flat.detach().numpy(), start), by_name(calls[0]["noise"], start)
    assert not any(added[name].any() for name in left)
    # What counts is clipped by its own norm: all that the samples give when nothing else does.
    assert CLIP / 2 < np.linalg.norm(flat.detach().numpy()) <= CLIP * float(weight.sum()) * 1.001
    for name in start.keys() - left:
        gradient = (added[name] + 2.0 * CLIP * noise[name]) / BATCH
        expected = start[name] - 0.05 * (gradient + 0.01 * start[name])
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def summed(lora: Any) -> Callable[..., np.ndarray]:
    """What some samples add to a step's sum, as one vector; no graph, so that any may be tried."""
    _, tuned = lora.recipe.build()
    frozen = tuned.frozen()
    tensors = {name: torch.from_numpy(value) for name, value in lora.start().items()}
    everything = torch.ones(lora.bundle.manifest.trainable.size)

    def add(pixels: np.ndarray, labels: np.ndarray, weight: np.ndarray, clip: float) -> np.ndarray:
        batch = {"pixel_values": torch.from_numpy(pixels)}
        added, _ = clipped_sum(
            tuned, clip, tensors, frozen, batch, torch.from_numpy(labels),
            torch.from_numpy(weight), everything,
        )  # fmt: skip
        return added.detach().numpy()

    return add


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]),
    clip=st.sampled_from([1e-3, 0.5, 10.0, 1e4]),
    row=st.integers(0, BATCH - 1),
)
def test_one_sample_changes_the_sum_by_the_clip_at_most(
    summed: Callable[..., np.ndarray], seed: int, size: float, clip: float, row: int
) -> None:
    rng = np.random.default_rng(seed)
    pixels = rng.standard_normal((BATCH, 1, 8, 8), np.float32)
    labels, weight = rng.integers(0, 10, BATCH), np.ones(BATCH, np.float32)
    whole = summed(pixels, labels, weight, clip)
    assert np.isfinite(whole).all()

    without = weight.copy()
    without[row] = 0
    slack = 1 + 1e-4
    removed = np.linalg.norm(whole - summed(pixels, labels, without, clip))
    assert removed <= clip * slack
    other, renamed = pixels.copy(), labels.copy()
    other[row] = np.float32(size) * rng.standard_normal((1, 8, 8), np.float32)
    renamed[row] = (labels[row] + 1) % 10
    assert np.linalg.norm(whole - summed(other, renamed, weight, clip)) <= 2 * clip * slack


def test_sum_of_gradients_below_the_clip_is_the_plain_gradient(
    summed: Callable[..., np.ndarray],
) -> None:
    rng = np.random.default_rng(1)
    pixels, labels = rng.standard_normal((BATCH, 1, 8, 8), np.float32), rng.integers(0, 10, BATCH)
    weight = np.ones(BATCH, np.float32)
    wide, wider = summed(pixels, labels, weight, 1e5), summed(pixels, labels, weight, 2e5)
    assert np.linalg.norm(wide) > 1
    np.testing.assert_allclose(wide, wider, rtol=1e-5, atol=1e-5)


def test_gradient_of_zero_adds_zero(lora: Any) -> None:
    _, tuned = lora.recipe.build()
    tensors = {name: torch.from_numpy(value) for name, value in lora.start().items()}
    added, _ = clipped_sum(
        tuned, CLIP, tensors, tuned.frozen(), {"pixel_values": torch.ones(BATCH, 1, 8, 8)},
        torch.zeros(BATCH, dtype=torch.int64), torch.ones(BATCH),
        torch.zeros(lora.bundle.manifest.trainable.size),
    )  # fmt: skip
    assert torch.equal(added, torch.zeros_like(added))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_sample_that_is_not_finite_spoils_the_update_instead_of_passing(
    lora: Any, value: float
) -> None:
    data = lora.data(SAMPLES)
    calls = calls_of(lora, data)
    drawn = int(np.flatnonzero(calls[0]["weight"])[0])
    calls[0]["batch/pixel_values"][drawn, 0, 3, 3] = value
    for name, tensor in run(lora, calls[:1]).items():
        assert not np.isfinite(tensor).all(), name
    data["pixel_values"][:, 0, 3, 3] = value
    with pytest.raises(TrainingError, match="loss became nan"):
        OnnxTrainer(lora.bundle, threads=1, keystream=repeatable_keystream).fit(
            lora.start(), data, learning_rate=0.05, epochs=1, seed=0
        )


def test_device_draws_what_no_seed_tells(lora: Any) -> None:
    def bits(trainer: OnnxTrainer) -> bytes:
        trained, _ = trainer.fit(
            lora.start(), lora.data(SAMPLES), learning_rate=0.05, epochs=1, seed=3
        )
        return b"".join(trained[name].tobytes() for name in sorted(trained))

    secret = OnnxTrainer(lora.bundle, threads=1)
    assert bits(secret) != bits(secret)
    repeatable = OnnxTrainer(lora.bundle, threads=1, keystream=repeatable_keystream)
    assert bits(repeatable) == bits(repeatable)


def test_steps_leave_their_arguments_as_they_were(lora: Any) -> None:
    _, tuned = lora.recipe.build()
    call = calls_of(lora, lora.data(SAMPLES))[0]
    tensors = {name: torch.from_numpy(value) for name, value in lora.start().items()}
    state = {
        name: torch.from_numpy(value)
        for name, value in initial_state(lora.bundle.manifest, lora.start()).items()
    }
    noise = torch.from_numpy(call["noise"])
    before = {name: value.clone() for name, value in (tensors | state).items()}
    private_step(tuned, lora.recipe.training)(
        tensors, state, tuned.frozen(),
        {"pixel_values": torch.from_numpy(call["batch/pixel_values"])},
        torch.from_numpy(call["labels"]), torch.from_numpy(call["weight"]), noise,
        torch.tensor(1.0), torch.ones_like(noise), torch.tensor(0.1),
    )  # fmt: skip
    for name, value in (tensors | state).items():
        assert torch.equal(value, before[name])
