# SPDX-License-Identifier: Apache-2.0
"""Compile a recipe that is trained split: what a device gets, and what its server keeps.

An entry of the cache holds two folders. `device` is what a bundle takes over:

    backbone.safetensors   frozen weights of the head
    initial.safetensors    prompt and tail before the first round
    head.onnx              hidden states [B, T, D] of a batch, with the prompt
    tail.onnx              one step of the tail, and the gradient at what entered it
    prompt.onnx            one step of the prompt, from the gradient at what left the head
    local.onnx             one step of both with the body skipped
    scores.onnx            EL2N of every sample, any batch size
    test.onnx              cross-entropy, correctness and logits of what entered the tail

`server` has the body, frozen, and no weight that the device has:

    backbone.safetensors   frozen weights of the body
    forward.onnx           what leaves the body, any batch size
    keeping.onnx           the same of a piece of a batch, and the values that the way back reads
    backward.onnx          the gradient at what entered it, from those values
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from protocol.files import BACKBONE_FILE, INITIAL_FILE
from protocol.tensors import TensorSpec
from tuning.cache import INFO_FILE, cached
from tuning.compiler import Compiled, describe, read_description
from tuning.flop_formulas import DeviceFlops
from tuning.recipe import Recipe

if TYPE_CHECKING:
    import torch

    from tuning.methods import Tuned

DEVICE: Final = "device"
SERVER: Final = "server"
DEVICE_GRAPHS: Final = {
    role: f"{role}.onnx" for role in ("head", "tail", "prompt", "local", "scores", "test")
}
SERVER_GRAPHS: Final = {role: f"{role}.onnx" for role in ("forward", "keeping", "backward")}
_MASK: Final = "attention_mask"


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitCompiled:
    """Both sides of a recipe in compiled form."""

    device: Compiled
    server: Path
    """Folder of the body's graphs and weights."""
    entering: TensorSpec
    """One sample's hidden states as they leave the device: float32 [T, D]."""
    leaving: TensorSpec
    """One sample's as they come back: the same, or [1, D] where the server pools."""
    masked: bool
    """Whether an attention mask goes with them, as of texts."""
    flops: DeviceFlops


def compile_split(recipe: Recipe, cache: Path | None = None, *, lanes: int = 1) -> SplitCompiled:
    """The compiled form of a recipe whose method cuts the network: from the cache, or made now.

    The server's graphs with a way back are for pieces of a batch, one a lane.

    Raises: as `compile_recipe`.
    """
    recipe.checked_method()
    rows = -(-recipe.training.batch_size // lanes)
    digest = f"split-{recipe.digest()}-{rows}"
    folder = cached(digest, lambda work: _compile_into(work, recipe, rows), cache)
    info = json.loads((folder / INFO_FILE).read_text(encoding="utf-8"))
    return SplitCompiled(
        device=read_description(folder / DEVICE, info["device"]),
        server=folder / SERVER,
        entering=TensorSpec(tuple(info["entering"]), "float32"),
        leaving=TensorSpec(tuple(info["leaving"]), "float32"),
        masked=info["masked"],
        flops=DeviceFlops(**info["flops"]),
    )


def _compile_into(folder: Path, recipe: Recipe, rows: int) -> None:
    import torch

    from tuning import split_step
    from tuning.flops import device_flops
    from tuning.ports import example_batch, prefixed, step_examples

    backbone, tuned = recipe.build()
    parts, tensors = split_step.parts_of(tuned), tuned.parameters()
    examples = step_examples(backbone, tuned, recipe)
    batch = example_batch(backbone, recipe.training.batch_size)
    masks = {name: value for name, value in tuned.prepare(batch).items() if name == _MASK}
    front = {name: tensors[name] for name in split_step.of_part(tuned, parts.head)}
    with torch.no_grad():
        entering = split_step.head_forward(
            tuned, front, split_step.frozen_of(tuned, parts.head), batch
        )
        body = split_step.frozen_of(tuned, parts.body)
        leaving = split_step.body_forward(tuned, body, entering, masks)

    flows = {"hidden": entering, **prefixed("mask/", masks)}
    came = {"hidden": leaving, **prefixed("mask/", masks)}
    device = folder / DEVICE
    device.mkdir()
    _save(
        device,
        _device_graphs(tuned, recipe, examples, flows, came),
        DEVICE_GRAPHS,
        {**split_step.short_way(tuned).frozen(), **split_step.frozen_of(tuned, parts.tail)},
        tensors,
    )
    server = folder / SERVER
    server.mkdir()
    _save(server, _server_graphs(tuned, flows, leaving, rows), SERVER_GRAPHS, body, {})
    flops = device_flops(tuned, recipe.training, examples)
    whole = sum(value.numel() for value in (*tensors.values(), *tuned.frozen().values()))
    info = {
        "entering": list(entering.shape[1:]),
        "leaving": list(leaving.shape[1:]),
        "masked": bool(masks),
        "flops": dataclasses.asdict(flops),
        "device": describe(
            backbone,
            tuned,
            recipe,
            files=DEVICE_GRAPHS,
            total_parameters=whole,
            step_flops=flops.through,
        ),
    }
    (folder / INFO_FILE).write_text(json.dumps(info, sort_keys=True), encoding="utf-8")


def _device_graphs(
    tuned: Tuned,
    recipe: Recipe,
    examples: Mapping[str, torch.Tensor],
    flows: Mapping[str, torch.Tensor],
    came: Mapping[str, torch.Tensor],
) -> dict[str, Any]:
    from tuning import graphs, split_step
    from tuning.ports import prefixed, split_names, step_graph
    from tuning.step import training_step

    spec, parts = recipe.training, split_step.parts_of(tuned)
    trainable = tuned.parameters()
    short = split_step.short_way(tuned)
    state = {
        name.removeprefix("state/"): value
        for name, value in examples.items()
        if name.startswith("state/")
    }
    batch = {name: value for name, value in examples.items() if name.startswith("batch/")}
    rate = {"learning_rate": examples["learning_rate"] * 0}
    labels = {"labels": examples["labels"]}

    def ports(part: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Trainable, state and frozen inputs of a part."""
        names = split_step.of_part(tuned, part)
        return (
            prefixed("trainable/", {name: trainable[name] for name in names}),
            prefixed("state/", split_step.state_of(state, names)),
            prefixed("frozen/", split_step.frozen_of(tuned, part)),
        )

    def head(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        given = split_names(named)
        hidden = split_step.head_forward(tuned, given["trainable"], given["frozen"], given["batch"])
        return {"hidden": hidden}

    def tail(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        given = split_names(named)
        updated, kept, loss, gradient = split_step.tail_step(
            tuned, spec, given["trainable"], given["state"], given["frozen"], named["hidden"],
            given["mask"], named["labels"], named["weight"], named["learning_rate"],
        )  # fmt: skip
        changed = prefixed("new/trainable/", updated) | prefixed("new/state/", kept)
        return changed | {"gradient": gradient, "loss": loss}

    def prompt(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        given = split_names(named)
        updated, kept = split_step.prompt_step(
            tuned, spec, given["trainable"], given["state"], given["frozen"], given["batch"],
            named["gradient"], named["learning_rate"],
        )  # fmt: skip
        return prefixed("new/trainable/", updated) | prefixed("new/state/", kept)

    def scores(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        given = split_names(named)
        found = split_step.el2n_scores(
            tuned, given["trainable"], given["frozen"], given["batch"], named["labels"]
        )
        return {"scores": found}

    def test(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        given = split_names(named)
        loss, correct, logits = split_step.tail_answer(
            tuned, given["trainable"], given["frozen"], named["hidden"], given["mask"],
            named["labels"],
        )  # fmt: skip
        return {"loss": loss, "correct": correct, "logits": logits}

    front, front_state, front_frozen = ports(parts.head)
    behind, behind_state, behind_frozen = ports(parts.tail)

    def new(*inputs: Mapping[str, Any]) -> list[str]:
        return [f"new/{name}" for given in inputs for name in given]

    weight = {"weight": examples["weight"]}
    return {
        "head": graphs.compile_graph(
            head, front | front_frozen | batch, ("hidden",), has_gradients=False,
            any_batch=tuple(batch),
        ),
        "tail": graphs.compile_graph(
            tail, behind | behind_state | behind_frozen | came | labels | weight | rate,
            (*new(behind, behind_state), "gradient", "loss"), has_gradients=True,
        ),
        "prompt": graphs.compile_graph(
            prompt,
            front | front_state | front_frozen | batch | {"gradient": flows["hidden"]} | rate,
            new(front, front_state), has_gradients=True,
        ),
        "local": step_graph(short, training_step(short, spec), examples),
        "scores": graphs.compile_graph(
            scores,
            behind | prefixed("frozen/", short.frozen()) | batch | labels, ("scores",),
            has_gradients=False, any_batch=(*batch, "labels"),
        ),
        "test": graphs.compile_graph(
            test, behind | behind_frozen | came | labels, ("loss", "correct", "logits"),
            has_gradients=False, any_batch=(*came, "labels"),
        ),
    }  # fmt: skip


def _server_graphs(
    tuned: Tuned, flows: Mapping[str, torch.Tensor], leaving: torch.Tensor, rows: int
) -> dict[str, Any]:
    from tuning import graphs, split_step
    from tuning.graph_pair import compile_pair
    from tuning.ports import prefixed, split_names

    frozen = prefixed("frozen/", split_step.frozen_of(tuned, split_step.parts_of(tuned).body))

    def forward(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        given = split_names(named)
        left = split_step.body_forward(tuned, given["frozen"], named["hidden"], given["mask"])
        return {"left": left}

    def there_and_back(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        given = split_names(named)
        left, entered = split_step.body_there_and_back(
            tuned, given["frozen"], named["hidden"], given["mask"], named["gradient"]
        )
        return {"left": left, "entered": entered}

    def piece(example: torch.Tensor) -> torch.Tensor:
        return example.new_zeros((rows, *example.shape[1:]))

    keeping, backward = compile_pair(
        there_and_back, frozen | {name: piece(flow) for name, flow in flows.items()},
        {"gradient": piece(leaving)}, there=("left",), back=("entered",),
    )  # fmt: skip
    return {
        "forward": graphs.compile_graph(
            forward, frozen | dict(flows), ("left",), has_gradients=False, any_batch=tuple(flows)
        ),
        "keeping": keeping,
        "backward": backward,
    }


def _save(
    folder: Path,
    models: Mapping[str, Any],
    files: Mapping[str, str],
    frozen: Mapping[str, torch.Tensor],
    trainable: Mapping[str, torch.Tensor],
) -> None:
    from safetensors.torch import save_file

    from tuning import graphs

    wanted = sorted({name for model in models.values() for name in graphs.frozen_inputs(model)})
    save_file({n: frozen[n].contiguous().clone() for n in wanted}, folder / BACKBONE_FILE)
    save_file({n: v.contiguous() for n, v in trainable.items()}, folder / INITIAL_FILE)
    places = graphs.stored_tensors(folder / BACKBONE_FILE)
    for role, model in models.items():
        graphs.refer_to_weights(model, places)
        graphs.save_model(model, folder / files[role])
