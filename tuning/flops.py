# SPDX-License-Identifier: Apache-2.0
"""Floating point operations of a training step, counted as torch runs it.

What is counted is said in flop_formulas.py, where the same is by formula.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from tuning import split_step
from tuning.flop_formulas import DeviceFlops
from tuning.ports import split_names
from tuning.step import cross_entropies, logits, training_step

if TYPE_CHECKING:
    from protocol.manifest import TrainingSpec
    from tuning.methods import Tuned


def step_flops(tuned: Tuned, examples: Mapping[str, torch.Tensor]) -> int:
    """Forward and backward of one batch.

    `examples` are the inputs of a training step by their port names.
    """
    trainable = {
        name.removeprefix("trainable/"): value.clone().requires_grad_()
        for name, value in examples.items()
        if name.startswith("trainable/")
    }
    batch = {
        name.removeprefix("batch/"): value
        for name, value in examples.items()
        if name.startswith("batch/")
    }
    with FlopCounterMode(display=False) as counter:
        scores = logits(tuned, trainable, tuned.frozen(), batch)
        cross_entropies(scores, examples["labels"]).sum().backward()
    return int(counter.get_total_flops())


def device_flops(
    tuned: Tuned, spec: TrainingSpec, examples: Mapping[str, torch.Tensor]
) -> DeviceFlops:
    """Of a method that cuts the network; `examples` as of `step_flops`, without frozen weights."""
    given = split_names(examples)
    tensors, state, batch = given["trainable"], given["state"], given["batch"]
    labels, weight, rate = examples["labels"], examples["weight"], examples["learning_rate"]
    parts, short = split_step.parts_of(tuned), split_step.short_way(tuned)
    masks = {n: v for n, v in tuned.prepare(batch).items() if n == "attention_mask"}
    front = {name: tensors[name] for name in split_step.of_part(tuned, parts.head)}
    behind = {name: tensors[name] for name in split_step.of_part(tuned, parts.tail)}
    head, tail = (split_step.frozen_of(tuned, part) for part in (parts.head, parts.tail))
    body = split_step.frozen_of(tuned, parts.body)
    with torch.no_grad():
        entering = split_step.head_forward(tuned, front, head, batch)
        left = split_step.body_forward(tuned, body, entering, masks)
    there = _counted(lambda: split_step.head_forward(tuned, front, head, batch))
    ending = _counted(
        lambda: split_step.tail_step(
            tuned,
            spec,
            behind,
            split_step.state_of(state, behind),
            tail,
            left,
            masks,
            labels,
            weight,
            rate,
        )
    )
    back = _counted(
        lambda: split_step.prompt_step(
            tuned, spec, front, split_step.state_of(state, front), head, batch, entering, rate
        )
    )
    if not parts.cut.head:
        # The prompt's gradient is its rows of what came: the compiled graph leaves the way there
        # out, which torch goes in vain.
        back -= there
    local = _counted(
        lambda: training_step(short, spec)(
            tensors, state, short.frozen(), batch, labels, weight, rate
        )
    )
    scores = _counted(lambda: split_step.el2n_scores(tuned, behind, short.frozen(), batch, labels))
    return DeviceFlops(through=there + ending + back, local=local, scores=scores)


class _Counter(TorchDispatchMode):
    """torch's own formulas of every operation that runs; its counter cannot be inside of
    `torch.func`."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def _counted(function: Callable[[], object]) -> int:
    with _Counter() as counter:
        function()
    return counter.total
