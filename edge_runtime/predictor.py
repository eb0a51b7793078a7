# SPDX-License-Identifier: Apache-2.0
"""Predict with a verified bundle, on onnxruntime alone: its own network, or any adapter of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from edge_runtime.adapter import Adapter, check_adapter
from edge_runtime.bundle import Bundle
from edge_runtime.errors import DataError, PredictionError
from edge_runtime.lame import corrected, softmax
from edge_runtime.preprocessing import apply
from edge_runtime.session import MovableGraph
from edge_runtime.trainer import EVALUATION_ROWS, check_inputs
from protocol.manifest import Manifest
from protocol.tensors import NOTHING

Samples = np.ndarray | Mapping[str, np.ndarray]
"""Raw images, uint8 [n, h, w] or [n, h, w, c]; or the model inputs that `preprocess` makes."""

_BEYOND: Final = 0.01  # share of the range by which rounding may leave it


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a batch is taken for.

    `probabilities` are the softmax of the logits, or what LAME made of it: `lame` then says by
    which likeness, that of the query features or of the logits.
    """

    logits: np.ndarray  # float32 [n, classes]
    probabilities: np.ndarray  # float32 [n, classes], rows add up to 1
    class_names: tuple[str, ...]
    lame: Literal["", "features", "logits"] = ""

    @property
    def classes(self) -> np.ndarray:
        """The number of each sample's most probable class, int64 [n]."""
        return self.probabilities.argmax(axis=1)

    @property
    def names(self) -> list[str]:
        """The name of each sample's most probable class."""
        return [self.class_names[number] for number in self.classes]


class Predictor:
    """A bundle's network, into which adapters are put without loading it again.

    It begins with the bundle's own: what was folded into `predict.onnx`, the initial tensors of a
    job that did not run yet, the final ones in the directory of a run. Graphs are loaded when they
    are first needed. One thread a core where `threads` is 0.
    """

    def __init__(self, bundle: Bundle, *, threads: int = 0) -> None:
        self.bundle = bundle
        self._threads = threads
        self._graphs: dict[str, MovableGraph] = {}
        self._adapter: Adapter | None = None
        self._held: dict[str, Any] = {}

    def use(self, adapter: Adapter | None) -> None:
        """Predict with this adapter from now on; None goes back to the bundle's own network.

        Adapters that share the offset of the frozen weights, as most do that have none, switch
        without anything being loaded.

        Raises:
            AdapterError: it is not of this bundle; the one in use then stays.
            PredictionError: the bundle was made for prediction alone and takes none.
        """
        if adapter is None:
            self._adapter, self._held = None, {}
            return
        from onnxruntime import OrtValue

        if "evaluate" not in self.bundle.manifest.graphs:
            raise PredictionError(
                "this bundle predicts with what was folded into it and takes no adapter; use the "
                "bundle that the adapter was trained with"
            )
        check_adapter(self.bundle.manifest, adapter)
        self._held = {
            f"trainable/{name}": OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value))
            for name, value in adapter.tensors.items()
        }
        self._adapter = adapter

    @property
    def has_features(self) -> bool:
        """Whether the method has features that may be computed once and shared or kept."""
        return "features" in self.bundle.manifest.graphs

    def features(self, samples: Samples) -> np.ndarray:
        """The query features of the samples, float32 [n, values]: they are the same for all
        adapters that share a backbone.

        Raises:
            PredictionError: the bundle's method has none.
            DataError: as `predict`.
        """
        if not self.has_features:
            raise PredictionError(
                f"method {self.bundle.manifest.method} has no query features; predict without them"
            )
        return self._run("features", "features", self._inputs(samples))

    def predict(
        self, samples: Samples, *, features: np.ndarray | None = None, lame: bool = False
    ) -> Prediction:
        """What the network in use takes the samples for; any number of them, in chunks.

        `features` are what `features` gave for the same samples: one forward pass is saved. With
        `lame` the probabilities of all samples together are corrected by their likeness (see
        `edge_runtime.lame`), that of the query features where the bundle has them, else that of the
        logits.

        Raises:
            DataError: no samples, or samples or features that do not fit the bundle.
            PredictionError: features without an adapter that they are for, or logits that are NaN
                or infinite.
        """
        inputs = self._inputs(samples)
        if features is not None:
            logits = self._with_features(inputs, features)
        elif lame and self.has_features and self._adapter is not None:
            features = self._run("features", "features", inputs)
            logits = self._with_features(inputs, features)
        else:
            logits = self._run("predict" if self._adapter is None else "evaluate", "logits", inputs)
        if not np.isfinite(logits).all():
            raise PredictionError(
                "the logits are NaN or infinite: the adapter's values are too large; train with a "
                "lower learning rate"
            )
        probabilities = softmax(logits)
        names = self.bundle.manifest.class_names
        if not lame:
            return Prediction(logits=logits, probabilities=probabilities, class_names=names)
        if features is None and self.has_features:
            features = self._run("features", "features", inputs)
        return Prediction(
            logits=logits,
            probabilities=corrected(probabilities, logits if features is None else features),
            class_names=names,
            lame="logits" if features is None else "features",
        )

    def _inputs(self, samples: Samples) -> dict[str, np.ndarray]:
        """The model inputs by their port names."""
        manifest = self.bundle.manifest
        if isinstance(samples, np.ndarray):
            if manifest.preprocessing.kind != "image":
                names = " and ".join(name for name, _ in manifest.inputs)
                raise DataError(
                    f"expected {names} by name, found one array: this bundle does not read images"
                )
            samples = apply(manifest.preprocessing, {"images": samples})
        else:
            first = next((samples[n] for n, _ in manifest.inputs if n in samples), None)
            check_inputs(manifest, samples, 0 if first is None else len(first))
            if first is None or not len(first):
                raise DataError("expected one sample or more, found none")
            _check_range(manifest, samples)
        return {f"batch/{name}": samples[name] for name, _ in manifest.inputs}

    def _with_features(self, inputs: Mapping[str, np.ndarray], features: np.ndarray) -> np.ndarray:
        if not self.has_features:
            raise PredictionError(
                f"method {self.bundle.manifest.method} takes no query features; leave them away"
            )
        if self._adapter is None:
            raise PredictionError(
                "query features go with an adapter: choose one with use(), such as "
                "Adapter(tensors=bundle.initial())"
            )
        samples = len(next(iter(inputs.values())))
        width = {port.name: port.shape for port in self._session("answer").get_inputs()}["features"]
        if features.dtype != np.float32 or features.shape != (samples, width[-1]):
            raise DataError(
                f"features: expected float32 {[samples, width[-1]]}, found {features.dtype} "
                f"{list(features.shape)}"
            )
        return self._run("answer", "logits", {**inputs, "features": features})

    def _run(self, role: str, output: str, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        from onnxruntime import OrtValue

        session = self._session(role)
        known = {port.name for port in session.get_inputs()}
        held = {name: value for name, value in self._held.items() if name in known}
        parts = []
        for chunk in _chunks(inputs):
            if "labels" in known:
                # The graph that evaluates gives logits, too; what it makes of labels is left alone.
                chunk["labels"] = np.zeros(len(next(iter(chunk.values()))), np.int64)
            feeds = held | {n: OrtValue.ortvalue_from_numpy(v) for n, v in chunk.items()}
            parts.append(session.run_with_ort_values([output], feeds)[0].numpy())
        return np.concatenate(parts)

    def _session(self, role: str) -> Any:
        if role not in self._graphs:
            path = self.bundle.path(role)
            self._graphs[role] = MovableGraph(path, threads=self._threads)
        offset = NOTHING if self._adapter is None else self._adapter.offset
        return self._graphs[role].at(offset)


def _chunks(inputs: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    samples = len(next(iter(inputs.values())))
    for start in range(0, samples, EVALUATION_ROWS):
        rows = slice(start, start + EVALUATION_ROWS)
        yield {name: np.ascontiguousarray(value[rows]) for name, value in inputs.items()}


def _check_range(manifest: Manifest, inputs: Mapping[str, np.ndarray]) -> None:
    """Values that `preprocess` could have made: 0 to 255 passed as they are would be noise."""
    settings = manifest.preprocessing
    if settings.kind != "image":
        return
    mean, std = np.array(settings.mean), np.array(settings.std)
    low, high = (0 - mean) / std, (1 - mean) / std
    slack = _BEYOND * (high - low)
    for name, _ in manifest.inputs:
        least, most = (fold(inputs[name], axis=(0, 2, 3)) for fold in (np.min, np.max))
        # Written so that NaN is outside.
        if not ((least >= low - slack) & (most <= high + slack)).all():
            raise DataError(
                f'input "{name}": expected values from {low.min():.3g} to {high.max():.3g}, as '
                f"preprocess makes them of pixels, found {least.min():.3g} to {most.max():.3g}; "
                "give the images themselves, as uint8"
            )
