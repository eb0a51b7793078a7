# SPDX-License-Identifier: Apache-2.0
"""Train and evaluate with a verified bundle, on onnxruntime alone."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Final

import numpy as np

from edge_runtime.batches import batch_plan
from edge_runtime.bundle import Bundle
from edge_runtime.errors import DataError, TrainingError
from edge_runtime.keystream import OpenKeystream, secret_keystream
from edge_runtime.private_batches import private_batches
from edge_runtime.session import MovableGraph
from edge_runtime.training_loop import TrainingLoop, batch_of
from protocol.manifest import ANCHOR, CORRECTION
from protocol.tensors import NOTHING, Tensors

if TYPE_CHECKING:
    from protocol.manifest import Manifest

# Rows evaluated at once: enough to fill a core's vector units, small enough to stay in its cache.
EVALUATION_ROWS: Final = 64


class OnnxTrainer:
    """A bundle's graphs, loaded when they are first needed. One thread a core where `threads` is 0.

    `data` is what `preprocess` makes of a client's arrays: the model inputs and "labels", first
    axis samples. `keystream` is what private training draws its samples and its noise from, given a
    seed: secret, unless it is a simulation that is to be repeated.
    """

    def __init__(
        self, bundle: Bundle, *, threads: int = 0, keystream: OpenKeystream = secret_keystream
    ) -> None:
        self.bundle = bundle
        self._threads = threads
        self._keystream = keystream
        self._names = [name for name, _ in bundle.manifest.inputs]

    def fit(
        self,
        tensors: Tensors,
        data: Mapping[str, np.ndarray],
        *,
        learning_rate: float,
        epochs: int,
        seed: int,
        most_steps: int = 0,
        frozen: Collection[str] = (),
        correction: Tensors = NOTHING,
        offset: Tensors = NOTHING,
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Train on `data` for `epochs` passes, in an order drawn from `seed`.

        `most_steps` above 0 ends the training after that many steps; tensors named in `frozen`
        stay as they are. `correction` is added to the gradients of the tensors that it names, where
        the bundle is of SCAFFOLD; `offset` moves frozen weights, as in `MovableGraph`.

        Where the bundle's training is private, the steps are those that it says, of samples drawn
        by the trainer's keystream: epochs, `most_steps` and the seed's order have no part in it.

        Returns:
            The trained tensors, and {"loss": mean over all steps, weighted by their samples}, with
            whatever the bundle's steps count, value by value ("selected/0"). Of private training
            the tensors alone are private.

        Raises:
            DataError: the data do not fit the bundle's inputs, or are fewer than its privacy was
                accounted for.
            TrainingError: the loss became NaN or infinite.
        """
        samples = check_data(self.bundle.manifest, data)
        training = self.bundle.manifest.training
        steps: Iterator[Mapping[str, np.ndarray]]
        if training.privacy is not None:
            drawn = private_batches(samples, training, self._keystream(seed))
            values = self.bundle.manifest.trainable.size
            steps, weights = drawn.calls(data, self._names, values), drawn.weights
        else:
            rng = np.random.default_rng(seed)
            indices, weights = batch_plan(
                samples, training.batch_size, epochs, rng, most_steps=most_steps
            )
            steps = (
                {**batch_of(data, self._names, rows), "weight": weight}
                for rows, weight in zip(indices, weights, strict=True)
            )
        state = initial_state(self.bundle.manifest, tensors, correction)
        trained, losses, tallies = self._loop.run(
            tensors, state, steps, learning_rate, frozen=frozen, offset=offset
        )
        return trained, metrics_of(losses, weights, tallies)

    def evaluate(
        self, tensors: Tensors, data: Mapping[str, np.ndarray], *, offset: Tensors = NOTHING
    ) -> dict[str, float]:
        """Mean cross-entropy and accuracy: {"loss", "accuracy"}, each over all samples."""
        losses, correct = self.evaluate_samples(tensors, data, offset=offset)
        return {"loss": rounded(float(losses.mean())), "accuracy": rounded(float(correct.mean()))}

    def evaluate_samples(
        self, tensors: Tensors, data: Mapping[str, np.ndarray], *, offset: Tensors = NOTHING
    ) -> tuple[np.ndarray, np.ndarray]:
        """Cross-entropy and correctness (0 or 1) of every sample: two float32 [samples]."""
        from onnxruntime import OrtValue

        samples = check_data(self.bundle.manifest, data)
        session = self._evaluation.at(offset)
        known = {port.name for port in session.get_inputs()}
        held = {
            f"trainable/{name}": OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value))
            for name, value in tensors.items()
            if f"trainable/{name}" in known
        }
        losses, correct = [], []
        for start in range(0, samples, EVALUATION_ROWS):
            rows = np.arange(start, min(start + EVALUATION_ROWS, samples))
            batch = batch_of(data, self._names, rows)
            feeds = held | {n: OrtValue.ortvalue_from_numpy(v) for n, v in batch.items()}
            loss, right = session.run_with_ort_values(["loss", "correct"], feeds)
            losses.append(loss.numpy())
            correct.append(right.numpy())
        return np.concatenate(losses), np.concatenate(correct)

    @cached_property
    def _loop(self) -> TrainingLoop:
        return TrainingLoop(self.bundle.path("train"), threads=self._threads)

    @cached_property
    def _evaluation(self) -> MovableGraph:
        return MovableGraph(self.bundle.path("evaluate"), threads=self._threads)


def check_data(manifest: Manifest, data: Mapping[str, np.ndarray]) -> int:
    """The number of samples, after checking names, shapes, types and labels.

    Raises:
        DataError: what was expected and what came, for the first disagreement.
    """
    if "labels" not in data:
        raise DataError("the data have no labels; training and evaluation need them")
    labels = data["labels"]
    samples = len(labels)
    if samples < 1:
        raise DataError("the data have no samples")
    classes = len(manifest.class_names)
    if labels.dtype != np.int64 or labels.shape != (samples,):
        raise DataError(f"labels: expected int64 [samples], found {labels.dtype} {labels.shape}")
    if labels.min() < 0 or labels.max() >= classes:
        raise DataError(
            f"labels: expected 0 to {classes - 1} ({classes} classes), found {labels.min()} to "
            f"{labels.max()}"
        )
    check_inputs(manifest, data, samples)
    return samples


def check_inputs(manifest: Manifest, data: Mapping[str, np.ndarray], samples: int) -> None:
    """Nothing, where `data` holds the model inputs of so many samples. Raises: as `check_data`."""
    for fault in input_faults(manifest, data, samples):
        raise DataError(fault)


def input_faults(manifest: Manifest, data: Mapping[str, np.ndarray], samples: int) -> Iterator[str]:
    """A sentence for every model input that `data` lacks, or holds in another shape or type."""
    for name, spec in manifest.inputs:
        if name not in data:
            yield f'input "{name}" is missing; the bundle reads {spec} a sample'
            continue
        found = data[name]
        if found.shape != (samples, *spec.shape) or found.dtype.name != spec.dtype:
            yield (
                f'input "{name}": expected {spec.dtype} {[samples, *spec.shape]}, found '
                f"{found.dtype} {list(found.shape)}"
            )


def initial_state(
    manifest: Manifest, tensors: Tensors, correction: Tensors = NOTHING
) -> dict[str, np.ndarray]:
    """The optimizer's state before the first step from `tensors`."""
    given = {ANCHOR + name: value for name, value in tensors.items()}
    given |= {CORRECTION + name: value for name, value in correction.items()}
    return {
        name: np.array(given[name], spec.dtype)
        if name in given
        else np.zeros(spec.shape, spec.dtype)
        for name, spec in manifest.state.entries
    }


def metrics_of(losses: np.ndarray, weights: np.ndarray, tallies: Tensors) -> dict[str, float]:
    """What a client may tell of its training; arguments as of `mean_loss`,
    with counts by name. {} where no sample was trained on, as private training may draw none.

    Raises: TrainingError as `mean_loss`.
    """
    if not weights.any():
        return {}
    counted = {
        f"{name}/{place}": rounded(float(count))
        for name, counts in tallies.items()
        for place, count in enumerate(counts)
    }
    return {"loss": mean_loss(losses, weights), **counted}


def mean_loss(losses: np.ndarray, weights: np.ndarray) -> float:
    """Mean of the step losses [steps], each weighted by the samples of its batch [steps, batch].

    Raises:
        TrainingError: it is NaN or infinite.
    """
    samples = weights.sum(axis=1)
    mean = float((losses.astype(np.float64) * samples).sum() / samples.sum())
    if not math.isfinite(mean):
        raise TrainingError(f"the training loss became {mean}; lower the learning rate")
    return rounded(mean)


def rounded(value: float) -> float:
    """Six digits: what a metric is worth, and the least that its header has to carry."""
    return float(f"{value:.6g}")
