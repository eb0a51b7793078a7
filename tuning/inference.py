# SPDX-License-Identifier: Apache-2.0
"""What predicts: a network with its adapter folded in where that can be, as a graph and weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from safetensors.torch import save_file

from protocol.files import BACKBONE_FILE, INITIAL_FILE, PREDICT_FILE
from protocol.tensors import NOTHING, Tensors
from tuning import graphs
from tuning.methods.method import Tuned
from tuning.ports import EXAMPLE_ROWS, example_batch, prefixed, split_names
from tuning.step import answer, logits

if TYPE_CHECKING:
    from tuning.backbones import Backbone

PREDICT_GRAPH: Final = "predict.onnx"


def save_predict_weights(
    tuned: Tuned, tensors: Tensors, folder: Path, *, offset: Tensors = NOTHING
) -> None:
    """Write the weights of `predict.onnx` that depend on the adapter, for trained tensors.

    `offset` is what frozen weights beside pairs of factors have moved by, by their names.
    """
    _, used = inference_form(tuned, _as_torch(tensors), _as_torch(offset))
    save_file(
        {name: used[name].contiguous().clone() for name in sorted(adapter_weights(tuned, used))},
        folder / PREDICT_FILE,
    )


def save_prediction(
    tuned: Tuned, backbone: Backbone, tensors: Tensors, folder: Path, *, offset: Tensors = NOTHING
) -> None:
    """Write `predict.onnx` for trained tensors by itself, all its weights in one file beside it.

    Nothing in the folder is trained any more: `initial.safetensors` is empty. `offset` as in
    `save_predict_weights`. Raises: CompileError.
    """
    inference, used = inference_form(tuned, _as_torch(tensors), _as_torch(offset))
    batch = prefixed("batch/", example_batch(backbone, EXAMPLE_ROWS))
    predicted = predict_graph(inference, used, batch)
    kept = {name: used[name].contiguous().clone() for name in graphs.frozen_inputs(predicted)}
    save_file(dict(sorted(kept.items())), folder / BACKBONE_FILE)
    save_file({}, folder / INITIAL_FILE)
    graphs.refer_to_weights(predicted, graphs.stored_tensors(folder / BACKBONE_FILE))
    graphs.save_model(predicted, folder / PREDICT_GRAPH)


def predict_graph(
    inference: Tuned, used: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]
) -> Any:
    """Logits of the inference form, all of whose weights are frozen ones."""

    def predict(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        parts = split_names(named)
        return {"logits": logits(inference, {}, parts["frozen"], parts["batch"])}

    return graphs.compile_graph(
        predict,
        prefixed("frozen/", used) | batch,
        ("logits",),
        has_gradients=False,
        any_batch=tuple(batch),
    )


def feature_graphs(
    tuned: Tuned,
    inference: Tuned,
    used: Mapping[str, torch.Tensor],
    batch: Mapping[str, torch.Tensor],
) -> dict[str, Any]:
    """The two halves of a prediction: a batch's features, and the answer to who knows them."""

    def features(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        parts = split_names(named)
        said = answer(inference, {}, parts["frozen"], parts["batch"])
        return {"features": getattr(said, tuned.features)}

    def respond(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        parts = split_names(named)
        said = answer(tuned, parts["trainable"], parts["frozen"], parts["batch"], named["features"])
        return {"logits": said.logits}

    weights = prefixed("frozen/", used)
    with torch.no_grad():
        known = features({**weights, **batch})
    trainable, frozen = tuned.parameters(), tuned.frozen()
    return {
        "features": graphs.compile_graph(
            features,
            weights | batch,
            ("features",),
            has_gradients=False,
            any_batch=tuple(batch),
        ),
        "answer": graphs.compile_graph(
            respond,
            prefixed("trainable/", trainable) | prefixed("frozen/", frozen) | batch | known,
            ("logits",),
            has_gradients=False,
            any_batch=(*batch, "features"),
        ),
    }


def inference_form(
    tuned: Tuned,
    tensors: Mapping[str, torch.Tensor],
    offset: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> tuple[Tuned, dict[str, torch.Tensor]]:
    """The module that predicts with `tensors`, and all its weights by their names of training."""
    module = copy.deepcopy(tuned.module)
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, value in tensors.items():
            parameters[tuned.trainable[name]].copy_(value)
        for name, change in offset.items():
            parameters[name].add_(change)
        if tuned.fold is not None:
            module = tuned.fold(module)
    inference = Tuned(module=module, trainable={}, prepare=tuned.prepare, features=tuned.features)
    return inference, inference.frozen()


def adapter_weights(tuned: Tuned, used: Mapping[str, torch.Tensor]) -> set[str]:
    """Which weights of the inference form depend on the trained tensors: try others, and look."""
    generator = torch.Generator().manual_seed(0)
    other = {
        name: value + 0.1 * torch.randn(value.shape, generator=generator)
        for name, value in tuned.parameters().items()
    }
    _, moved = inference_form(tuned, other)
    return {name for name, value in used.items() if not torch.equal(value, moved[name])}


def _as_torch(tensors: Tensors) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in tensors.items()}
