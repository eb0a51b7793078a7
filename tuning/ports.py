# SPDX-License-Identifier: Apache-2.0
"""The ports of compiled graphs: names, example inputs, and functions of them.

A port is named for what it carries: `trainable/NAME`, `state/NAME`, `frozen/NAME`, `batch/NAME`,
and `new/...` for what a step gives back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import torch

from tuning import graphs
from tuning.step import initial_state

if TYPE_CHECKING:
    from tuning.backbones import Backbone
    from tuning.methods import Tuned
    from tuning.recipe import Recipe

# Ports of a private step beside those of a plain one, in the order of its arguments.
PRIVATE: Final = ("noise", "applies", "trained")
# Ports without a client axis in a cohort's graph.
COMMON: Final = ("learning_rate", "trained")
EXAMPLE_ROWS: Final = 4  # what a graph of any batch size is traced with; 0 and 1 are special there


def step_examples(backbone: Backbone, tuned: Tuned, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Example inputs of a training step by their port names, frozen weights left out."""
    trainable = tuned.parameters()
    state = initial_state(tuned, recipe.training)
    samples = recipe.training.batch_size
    draws: dict[str, torch.Tensor] = {}
    if recipe.training.privacy is not None:
        values = sum(value.numel() for value in trainable.values())
        draws = {
            "noise": torch.zeros(values),
            "applies": torch.ones(()),
            "trained": torch.ones(values),
        }
    return {
        **prefixed("trainable/", trainable),
        **prefixed("state/", state),
        **prefixed("batch/", example_batch(backbone, samples)),
        "labels": torch.arange(samples) % recipe.classes,
        "weight": torch.ones(samples),
        **draws,
        "learning_rate": torch.tensor(recipe.training.learning_rate),
    }


def example_batch(backbone: Backbone, samples: int) -> dict[str, torch.Tensor]:
    """A batch of the shape that the backbone's preprocessing makes."""
    pre = backbone.preprocessing
    if pre.kind == "image":
        return {"pixel_values": torch.zeros(samples, pre.channels, pre.size, pre.size)}
    return {
        "input_ids": torch.zeros(samples, pre.max_length, dtype=torch.int64),
        "attention_mask": torch.zeros(samples, 1, 1, pre.max_length),
    }


def step_graph(tuned: Tuned, step: Any, examples: Mapping[str, torch.Tensor]) -> Any:
    """The graph of a training step, private or not, of one client or a cohort, from examples of
    all its ports but frozen weights. Raises: CompileError."""

    def function(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        parts = split_names(named)
        draws = tuple(named[name] for name in PRIVATE if name in named)
        updated, kept, loss = step(
            parts["trainable"],
            parts["state"],
            parts["frozen"],
            parts["batch"],
            named["labels"],
            named["weight"],
            *draws,
            named["learning_rate"],
        )
        return prefixed("new/trainable/", updated) | prefixed("new/state/", kept) | {"loss": loss}

    ports = [f"new/{name}" for name in examples if name.startswith(("trainable/", "state/"))]
    return graphs.compile_graph(
        function,
        {**examples, **prefixed("frozen/", tuned.frozen())},
        (*ports, "loss"),
        has_gradients=True,
    )


def split_names(named: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Port names split at their first slash: {"trainable": {...}, "frozen": {...}, ...}."""
    parts: dict[str, dict[str, torch.Tensor]] = {
        part: {} for part in ("trainable", "state", "frozen", "batch", "mask")
    }
    for name, value in named.items():
        part, slash, rest = name.partition("/")
        if slash:
            parts[part][rest] = value
    return parts


def prefixed(prefix: str, named: Mapping[str, Any]) -> dict[str, Any]:
    """The same values with `prefix` before their names."""
    return {prefix + name: value for name, value in named.items()}
