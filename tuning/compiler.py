# SPDX-License-Identifier: Apache-2.0
"""Compile a recipe: graphs, weights and first tensors, in a cache by content.

An entry of the cache holds what a bundle holds but for the signed manifest, and the cohort graphs
of the simulator beside it:

    backbone.safetensors   frozen weights, once for all graphs
    initial.safetensors    the trainable tensors before the first round
    train.onnx             one step of one client
    evaluate.onnx          cross-entropy, correctness and logits of every sample, any batch size
    predict.onnx           logits, any batch size, with the adapter folded in where it can be
    predict.safetensors    the weights of predict.onnx that depend on the adapter
    features.onnx          what of a batch may be known beforehand, where a method has such
                           features (`Tuned.features`): they do not depend on the adapter
    answer.onnx            logits as of evaluate.onnx, of batches whose features are known
    compiled.json          what the above are (`Compiled`)
    cohort-N.onnx          one step of N clients
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from protocol.factors import FactorPair
from protocol.files import BACKBONE_FILE, INITIAL_FILE, PREDICT_FILE
from protocol.manifest import Preprocessing
from protocol.tensors import ParamSpec, TensorSpec
from tuning.cache import INFO_FILE, cached
from tuning.errors import CompileError
from tuning.recipe import Recipe

if TYPE_CHECKING:
    import torch

    from tuning.backbones import Backbone
    from tuning.methods import Tuned

GRAPHS: Final = {role: f"{role}.onnx" for role in ("train", "evaluate", "predict")}
FEATURE_GRAPHS: Final = {role: f"{role}.onnx" for role in ("features", "answer")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """A recipe in compiled form, in a folder of the cache."""

    folder: Path
    backbone: str
    trainable: ParamSpec
    state: ParamSpec
    pairs: tuple[FactorPair, ...]
    inputs: tuple[tuple[str, TensorSpec], ...]
    preprocessing: Preprocessing
    total_parameters: int
    """Of the backbone with its classifier, whatever is trained."""
    step_flops: int
    """Floating point operations of one training step of one client, full batch; of a split network
    the device's part of it."""
    graphs: Mapping[str, str]
    """Role to file, of those that a bundle takes over."""

    def files(self) -> list[str]:
        """The files that a bundle takes over."""
        # Where a network is cut, no single graph predicts.
        adapted = [PREDICT_FILE] if "predict" in self.graphs else []
        return [BACKBONE_FILE, INITIAL_FILE, *adapted, *self.graphs.values()]


def compile_recipe(recipe: Recipe, cache: Path | None = None) -> Compiled:
    """The compiled form of a recipe: from the cache, or made now and kept there.

    Raises:
        BackboneError, MethodError: the recipe does not fit together.
        CompileError: the step has no plain ONNX form.
    *Cost* about ten seconds where it is not cached.
    """
    recipe.checked_method()
    folder = cached(recipe.digest(), lambda work: _compile_into(work, recipe), cache)
    info = json.loads((folder / INFO_FILE).read_text(encoding="utf-8"))
    return read_description(folder, info)


def cohort_graph(compiled: Compiled, recipe: Recipe, clients: int) -> Path:
    """The graph of one step of `clients` clients at once, from the cache or made now."""
    path = compiled.folder / f"cohort-{clients}.onnx"
    if path.is_file():
        return path
    from tuning import graphs
    from tuning.ports import COMMON, step_examples, step_graph
    from tuning.private_step import private_cohort_step
    from tuning.step import cohort_step

    backbone, tuned = recipe.build()
    examples = {
        name: value if name in COMMON else value.unsqueeze(0).repeat(clients, *([1] * value.dim()))
        for name, value in step_examples(backbone, tuned, recipe).items()
    }
    make = cohort_step if recipe.training.privacy is None else private_cohort_step
    try:
        model = step_graph(tuned, make(tuned, recipe.training), examples)
    except CompileError as fault:
        raise CompileError(
            "this method cannot train many clients in one graph, take "
            f'simulation.backend = "sequential": {fault}'
        ) from fault
    graphs.refer_to_weights(model, graphs.stored_tensors(compiled.folder / BACKBONE_FILE))
    making = path.with_suffix(f".{os.getpid()}.part")
    graphs.save_model(model, making)
    making.replace(path)
    return path


def _compile_into(folder: Path, recipe: Recipe) -> None:
    from safetensors.torch import save_file

    from tuning import graphs, inference
    from tuning.flops import step_flops
    from tuning.ports import prefixed, split_names, step_examples, step_graph
    from tuning.private_step import private_step
    from tuning.step import evaluation, training_step

    backbone, tuned = recipe.build()
    trainable, frozen = tuned.parameters(), tuned.frozen()
    examples = step_examples(backbone, tuned, recipe)
    make = training_step if recipe.training.privacy is None else private_step
    train = step_graph(tuned, make(tuned, recipe.training), examples)

    batch = {name: value for name, value in examples.items() if name.startswith("batch/")}
    labels = {"labels": examples["labels"]}
    evaluate_samples = evaluation(tuned)

    def evaluate(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        parts = split_names(named)
        loss, correct, scores = evaluate_samples(
            parts["trainable"], parts["frozen"], parts["batch"], named["labels"]
        )
        return {"loss": loss, "correct": correct, "logits": scores}

    evaluated = graphs.compile_graph(
        evaluate,
        prefixed("trainable/", trainable) | prefixed("frozen/", frozen) | batch | labels,
        ("loss", "correct", "logits"),
        has_gradients=False,
        any_batch=(*batch, "labels"),
    )

    folded, used = inference.inference_form(tuned, trainable)
    changed = inference.adapter_weights(tuned, used)
    predicted = inference.predict_graph(folded, used, batch)
    models = {"train": train, "evaluate": evaluated}
    if tuned.features:
        models |= inference.feature_graphs(tuned, folded, used, batch)

    wanted = {name for model in models.values() for name in graphs.frozen_inputs(model)}
    wanted |= {name for name in graphs.frozen_inputs(predicted) if name not in changed}
    shared = {**{name: used[name] for name in used if name not in changed}, **frozen}
    kept = {name: shared[name].contiguous().clone() for name in sorted(wanted)}
    save_file(kept, folder / BACKBONE_FILE)
    save_file({n: v.contiguous() for n, v in trainable.items()}, folder / INITIAL_FILE)
    inference.save_predict_weights(tuned, _as_numpy(trainable), folder)
    places = graphs.stored_tensors(folder / BACKBONE_FILE)
    files = GRAPHS | (FEATURE_GRAPHS if tuned.features else {})
    for role, model in models.items():
        graphs.refer_to_weights(model, places)
        graphs.save_model(model, folder / files[role])
    graphs.refer_to_weights(predicted, places | graphs.stored_tensors(folder / PREDICT_FILE))
    graphs.save_model(predicted, folder / GRAPHS["predict"])

    info = describe(
        backbone,
        tuned,
        recipe,
        files=files,
        total_parameters=sum(value.numel() for value in used.values()),
        step_flops=step_flops(tuned, examples),
    )
    (folder / INFO_FILE).write_text(json.dumps(info, sort_keys=True), encoding="utf-8")


def describe(
    backbone: Backbone,
    tuned: Tuned,
    recipe: Recipe,
    *,
    files: Mapping[str, str],
    total_parameters: int,
    step_flops: int,
) -> dict[str, Any]:
    """What `read_description` needs to know of graphs in `files`, as JSON."""
    from tuning.ports import example_batch
    from tuning.step import initial_state

    batch = example_batch(backbone, 1)
    state = initial_state(tuned, recipe.training)
    return {
        "backbone": backbone.name,
        "trainable": ParamSpec.of(_as_numpy(tuned.parameters())).to_json(),
        "state": ParamSpec.of(_as_numpy(state)).to_json(),
        "pairs": [[pair.down, pair.up, pair.scale, pair.base] for pair in tuned.pairs],
        "inputs": [
            [name, str(value.numpy().dtype), list(value.shape[1:])] for name, value in batch.items()
        ],
        "preprocessing": {
            name: getattr(backbone.preprocessing, name)
            for name in ("kind", "size", "channels", "mean", "std", "max_length")
        },
        "total_parameters": total_parameters,
        "step_flops": step_flops,
        "graphs": dict(files),
    }


def read_description(folder: Path, info: Mapping[str, Any]) -> Compiled:
    """The inverse of `describe`, of graphs in `folder`."""
    preprocessing = dict(info["preprocessing"])
    for name in ("mean", "std"):
        preprocessing[name] = tuple(preprocessing[name])
    return Compiled(
        folder=folder,
        backbone=info["backbone"],
        trainable=ParamSpec.from_json(info["trainable"]),
        state=ParamSpec.from_json(info["state"]),
        pairs=tuple(FactorPair(down=d, up=u, scale=s, base=b) for d, u, s, b in info["pairs"]),
        inputs=tuple(
            (name, TensorSpec(tuple(shape), dtype)) for name, dtype, shape in info["inputs"]
        ),
        preprocessing=Preprocessing(**preprocessing),
        total_parameters=info["total_parameters"],
        step_flops=info["step_flops"],
        graphs=MappingProxyType(info["graphs"]),
    )


def _as_numpy(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in tensors.items()}
