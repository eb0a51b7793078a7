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

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from protocol.factors import FactorPair
from protocol.files import BACKBONE_FILE
from protocol.manifest import Preprocessing
from protocol.tensors import NOTHING, ParamSpec, Tensors, TensorSpec
from tuning.errors import CompileError
from tuning.recipe import Recipe

if TYPE_CHECKING:
    import torch

    from tuning.backbones import Backbone
    from tuning.methods import Tuned

INITIAL_FILE: Final = "initial.safetensors"
PREDICT_FILE: Final = "predict.safetensors"
INFO_FILE: Final = "compiled.json"
EXAMPLE_ROWS: Final = 4  # what a graph of any batch size is traced with; 0 and 1 are special there
GRAPHS: Final = {role: f"{role}.onnx" for role in ("train", "evaluate", "predict")}
FEATURE_GRAPHS: Final = {role: f"{role}.onnx" for role in ("features", "answer")}
# Compiled jobs that are kept; the least recently used go first. A text job is about 100 MB.
CACHE_ENTRIES: Final = 24


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
    """Floating point operations of one training step of one client, full batch."""
    graphs: Mapping[str, str]
    """Role to file, of those that a bundle takes over."""

    def files(self) -> list[str]:
        """The files that a bundle takes over."""
        return [BACKBONE_FILE, INITIAL_FILE, PREDICT_FILE, *self.graphs.values()]


def default_cache() -> Path:
    """`$FEDLOOM_CACHE`, or `fedloom/compiled` in the user's cache folder."""
    if chosen := os.environ.get("FEDLOOM_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "fedloom" / "compiled"


def compile_recipe(recipe: Recipe, cache: Path | None = None) -> Compiled:
    """The compiled form of a recipe: from the cache, or made now and kept there.

    Raises:
        BackboneError, MethodError: the recipe does not fit together.
        CompileError: the step has no plain ONNX form.
    *Cost* about ten seconds where it is not cached.
    """
    recipe.checked_method()
    cache = cache or default_cache()
    folder = cache / recipe.digest()
    if not (folder / INFO_FILE).is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="making-") as making:
            work = Path(making) / "entry"
            work.mkdir()
            _compile_into(work, recipe)
            try:
                work.rename(folder)
            except OSError:
                # Another process made the same entry first; both hold the same content.
                if not (folder / INFO_FILE).is_file():
                    raise
        _forget_oldest(cache, keep=folder)
    os.utime(folder)
    return _read_info(folder)


def cohort_graph(compiled: Compiled, recipe: Recipe, clients: int) -> Path:
    """The graph of one step of `clients` clients at once, from the cache or made now."""
    path = compiled.folder / f"cohort-{clients}.onnx"
    if path.is_file():
        return path
    from tuning import graphs
    from tuning.step import cohort_step

    backbone, tuned = recipe.build()
    examples = {
        name: value.unsqueeze(0).repeat(clients, *([1] * value.dim()))
        for name, value in _step_examples(backbone, tuned, recipe).items()
        if name != "learning_rate"
    }
    try:
        model = _step_graph(tuned, cohort_step(tuned, recipe.training), examples)
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


def save_predict_weights(
    tuned: Tuned, tensors: Tensors, folder: Path, *, offset: Tensors = NOTHING
) -> None:
    """Write the weights of `predict.onnx` that depend on the adapter, for trained tensors.

    `offset` is what frozen weights beside pairs of factors have moved by, by their names.
    """
    from safetensors.torch import save_file

    _, used = _inference_form(tuned, _as_torch(tensors), _as_torch(offset))
    save_file(
        {name: used[name].contiguous().clone() for name in sorted(_adapter_weights(tuned, used))},
        folder / PREDICT_FILE,
    )


def save_prediction(
    tuned: Tuned, backbone: Backbone, tensors: Tensors, folder: Path, *, offset: Tensors = NOTHING
) -> None:
    """Write `predict.onnx` for trained tensors by itself, all its weights in one file beside it.

    Nothing in the folder is trained any more: `initial.safetensors` is empty. `offset` as in
    `save_predict_weights`. Raises: CompileError.
    """
    from safetensors.torch import save_file

    from tuning import graphs

    inference, used = _inference_form(tuned, _as_torch(tensors), _as_torch(offset))
    batch = _prefixed("batch/", example_batch(backbone, EXAMPLE_ROWS))
    predicted = _predict_graph(inference, used, batch)
    kept = {name: used[name].contiguous().clone() for name in graphs.frozen_inputs(predicted)}
    save_file(dict(sorted(kept.items())), folder / BACKBONE_FILE)
    save_file({}, folder / INITIAL_FILE)
    graphs.refer_to_weights(predicted, graphs.stored_tensors(folder / BACKBONE_FILE))
    graphs.save_model(predicted, folder / GRAPHS["predict"])


def _compile_into(folder: Path, recipe: Recipe) -> None:
    from safetensors.torch import save_file

    from tuning import graphs
    from tuning.flops import step_flops
    from tuning.step import evaluation, initial_state, training_step

    backbone, tuned = recipe.build()
    trainable, frozen = tuned.parameters(), tuned.frozen()
    examples = _step_examples(backbone, tuned, recipe)
    train = _step_graph(tuned, training_step(tuned, recipe.training), examples)

    batch = {name: value for name, value in examples.items() if name.startswith("batch/")}
    labels = {"labels": examples["labels"]}
    evaluate_samples = evaluation(tuned)

    def evaluate(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        parts = _parts(named)
        loss, correct, scores = evaluate_samples(
            parts["trainable"], parts["frozen"], parts["batch"], named["labels"]
        )
        return {"loss": loss, "correct": correct, "logits": scores}

    evaluated = graphs.compile_graph(
        evaluate,
        _prefixed("trainable/", trainable) | _prefixed("frozen/", frozen) | batch | labels,
        ("loss", "correct", "logits"),
        has_gradients=False,
        any_batch=(*batch, "labels"),
    )

    inference, used = _inference_form(tuned, trainable)
    changed = _adapter_weights(tuned, used)
    predicted = _predict_graph(inference, used, batch)
    models = {"train": train, "evaluate": evaluated}
    if tuned.features:
        models |= _feature_graphs(tuned, inference, used, batch)

    wanted = {name for model in models.values() for name in graphs.frozen_inputs(model)}
    wanted |= {name for name in graphs.frozen_inputs(predicted) if name not in changed}
    shared = {**{name: used[name] for name in used if name not in changed}, **frozen}
    kept = {name: shared[name].contiguous().clone() for name in sorted(wanted)}
    save_file(kept, folder / BACKBONE_FILE)
    save_file({n: v.contiguous() for n, v in trainable.items()}, folder / INITIAL_FILE)
    save_predict_weights(tuned, _as_numpy(trainable), folder)
    places = graphs.stored_tensors(folder / BACKBONE_FILE)
    files = GRAPHS | (FEATURE_GRAPHS if tuned.features else {})
    for role, model in models.items():
        graphs.refer_to_weights(model, places)
        graphs.save_model(model, folder / files[role])
    graphs.refer_to_weights(predicted, places | graphs.stored_tensors(folder / PREDICT_FILE))
    graphs.save_model(predicted, folder / GRAPHS["predict"])

    state = initial_state(tuned, recipe.training)
    info = {
        "backbone": backbone.name,
        "trainable": ParamSpec.of(_as_numpy(trainable)).to_json(),
        "state": ParamSpec.of(_as_numpy(state)).to_json(),
        "pairs": [[pair.down, pair.up, pair.scale, pair.base] for pair in tuned.pairs],
        "inputs": [
            [name.removeprefix("batch/"), str(value.numpy().dtype), list(value.shape[1:])]
            for name, value in batch.items()
        ],
        "preprocessing": {
            name: getattr(backbone.preprocessing, name)
            for name in ("kind", "size", "channels", "mean", "std", "max_length")
        },
        "total_parameters": sum(value.numel() for value in used.values()),
        "step_flops": step_flops(tuned, examples),
        "graphs": files,
    }
    (folder / INFO_FILE).write_text(json.dumps(info, sort_keys=True), encoding="utf-8")


def _predict_graph(
    inference: Tuned, used: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]
) -> Any:
    """Logits of the inference form, all of whose weights are frozen ones."""
    from tuning import graphs
    from tuning.step import logits

    def predict(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        parts = _parts(named)
        return {"logits": logits(inference, {}, parts["frozen"], parts["batch"])}

    return graphs.compile_graph(
        predict,
        _prefixed("frozen/", used) | batch,
        ("logits",),
        has_gradients=False,
        any_batch=tuple(batch),
    )


def _feature_graphs(
    tuned: Tuned,
    inference: Tuned,
    used: Mapping[str, torch.Tensor],
    batch: Mapping[str, torch.Tensor],
) -> dict[str, Any]:
    """The two halves of a prediction: a batch's features, and the answer to who knows them."""
    import torch

    from tuning import graphs
    from tuning.step import answer

    def features(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        parts = _parts(named)
        said = answer(inference, {}, parts["frozen"], parts["batch"])
        return {"features": getattr(said, tuned.features)}

    def respond(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        parts = _parts(named)
        said = answer(tuned, parts["trainable"], parts["frozen"], parts["batch"], named["features"])
        return {"logits": said.logits}

    weights = _prefixed("frozen/", used)
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
            _prefixed("trainable/", trainable) | _prefixed("frozen/", frozen) | batch | known,
            ("logits",),
            has_gradients=False,
            any_batch=(*batch, "features"),
        ),
    }


def _read_info(folder: Path) -> Compiled:
    info = json.loads((folder / INFO_FILE).read_text(encoding="utf-8"))
    preprocessing = info["preprocessing"]
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


def _step_examples(backbone: Backbone, tuned: Tuned, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Example inputs of a training step by their port names, frozen weights left out."""
    import torch

    from tuning.step import initial_state

    trainable = tuned.parameters()
    state = initial_state(tuned, recipe.training)
    samples = recipe.training.batch_size
    return {
        **_prefixed("trainable/", trainable),
        **_prefixed("state/", state),
        **_prefixed("batch/", example_batch(backbone, samples)),
        "labels": torch.arange(samples) % recipe.classes,
        "weight": torch.ones(samples),
        "learning_rate": torch.tensor(recipe.training.learning_rate),
    }


def example_batch(backbone: Backbone, samples: int) -> dict[str, torch.Tensor]:
    """A batch of the shape that the backbone's preprocessing makes."""
    import torch

    pre = backbone.preprocessing
    if pre.kind == "image":
        return {"pixel_values": torch.zeros(samples, pre.channels, pre.size, pre.size)}
    return {
        "input_ids": torch.zeros(samples, pre.max_length, dtype=torch.int64),
        "attention_mask": torch.zeros(samples, 1, 1, pre.max_length),
    }


def _step_graph(tuned: Tuned, step: Any, examples: Mapping[str, torch.Tensor]) -> Any:
    import torch

    from tuning import graphs

    examples = {**examples, "learning_rate": torch.tensor(0.0)}

    def function(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        parts = _parts(named)
        updated, kept, loss = step(
            parts["trainable"],
            parts["state"],
            parts["frozen"],
            parts["batch"],
            named["labels"],
            named["weight"],
            named["learning_rate"],
        )
        return _prefixed("new/trainable/", updated) | _prefixed("new/state/", kept) | {"loss": loss}

    ports = [f"new/{name}" for name in examples if name.startswith(("trainable/", "state/"))]
    return graphs.compile_graph(
        function,
        {**examples, **_prefixed("frozen/", tuned.frozen())},
        (*ports, "loss"),
        has_gradients=True,
    )


def _parts(named: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Port names split at their first slash: {"trainable": {...}, "frozen": {...}, ...}."""
    parts: dict[str, dict[str, torch.Tensor]] = {
        part: {} for part in ("trainable", "state", "frozen", "batch")
    }
    for name, value in named.items():
        part, slash, rest = name.partition("/")
        if slash:
            parts[part][rest] = value
    return parts


def _prefixed(prefix: str, named: Mapping[str, Any]) -> dict[str, Any]:
    return {prefix + name: value for name, value in named.items()}


def _inference_form(
    tuned: Tuned,
    tensors: Mapping[str, torch.Tensor],
    offset: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> tuple[Tuned, dict[str, torch.Tensor]]:
    """The module that predicts with `tensors`, and all its weights by their names of training."""
    import torch

    from tuning.methods.method import Tuned as TunedModule

    module = copy.deepcopy(tuned.module)
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, value in tensors.items():
            parameters[tuned.trainable[name]].copy_(value)
        for name, change in offset.items():
            parameters[name].add_(change)
        if tuned.fold is not None:
            module = tuned.fold(module)
    inference = TunedModule(
        module=module, trainable={}, prepare=tuned.prepare, features=tuned.features
    )
    return inference, inference.frozen()


def _adapter_weights(tuned: Tuned, used: Mapping[str, torch.Tensor]) -> set[str]:
    """Which weights of the inference form depend on the trained tensors: try others, and look."""
    import torch

    generator = torch.Generator().manual_seed(0)
    other = {
        name: value + 0.1 * torch.randn(value.shape, generator=generator)
        for name, value in tuned.parameters().items()
    }
    _, moved = _inference_form(tuned, other)
    return {name for name, value in used.items() if not torch.equal(value, moved[name])}


def _as_numpy(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in tensors.items()}


def _as_torch(tensors: Tensors) -> dict[str, torch.Tensor]:
    import torch

    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in tensors.items()}


def _forget_oldest(cache: Path, *, keep: Path) -> None:
    entries = [path for path in cache.iterdir() if (path / INFO_FILE).is_file() and path != keep]
    entries.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for path in entries[CACHE_ENTRIES - 1 :]:
        shutil.rmtree(path, ignore_errors=True)
