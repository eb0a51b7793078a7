# SPDX-License-Identifier: Apache-2.0
"""Floating point operations of a training step, counted by torch as it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch.utils.flop_counter import FlopCounterMode

from tuning.step import cross_entropies, logits

if TYPE_CHECKING:
    from tuning.methods import Tuned


def step_flops(tuned: Tuned, examples: Mapping[str, torch.Tensor]) -> int:
    """Forward and backward of one batch, matrix products and attention only (2 a multiply-add).

    `examples` are the inputs of a training step by their port names. The optimizer and everything
    elementwise are left out, as is usual.
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
