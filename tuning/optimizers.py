# SPDX-License-Identifier: Apache-2.0
"""Client optimizers as pure functions, so that they compile into the training graph.

SGD with momentum and decoupled weight decay AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101,
algorithm 2), in the form of torch.optim: velocity = momentum * velocity + gradient.

With `proximal` = mu every gradient is that of loss + mu / 2 * |w - w0|^2, w0 being the tensors that
the round began with (FedProx, Li et al. 2020, arXiv 1812.06127, algorithm 2); they are kept in the
state as "anchor/...".

With `scaffold` every gradient has a correction added to it, which the state holds as
"correction/..." and no step changes: c - c_i of SCAFFOLD (Karimireddy et al. 2020, arXiv
1910.06378, algorithm 1), before weight decay as before the step itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from protocol.manifest import ANCHOR, CORRECTION

if TYPE_CHECKING:
    from protocol.manifest import TrainingSpec

Named = Mapping[str, torch.Tensor]

BETA_1, BETA_2 = 0.9, 0.999
# Larger than torch's 1e-8: Adam divides a gradient by its own size, so that below epsilon rounding
# errors would become full steps, and no two engines would agree on where they go.
EPSILON = 1e-6


def initial_state(spec: TrainingSpec, trainable: Named) -> dict[str, torch.Tensor]:
    """What `step` reads before the first step: zeros, and the anchors where there are any."""
    held = {}
    if spec.proximal:
        held |= {f"{ANCHOR}{name}": value.clone() for name, value in trainable.items()}
    if spec.scaffold:
        held |= {f"{CORRECTION}{name}": torch.zeros_like(v) for name, v in trainable.items()}
    return held | _moments(spec, trainable)


def _moments(spec: TrainingSpec, trainable: Named) -> dict[str, torch.Tensor]:
    if spec.optimizer == "adamw":
        state = {f"first/{name}": torch.zeros_like(value) for name, value in trainable.items()}
        state |= {f"second/{name}": torch.zeros_like(value) for name, value in trainable.items()}
        return state | {"steps": torch.zeros(())}
    if spec.momentum == 0:
        return {}
    return {f"velocity/{name}": torch.zeros_like(value) for name, value in trainable.items()}


def step(
    spec: TrainingSpec,
    trainable: Named,
    gradients: Named,
    state: Named,
    learning_rate: torch.Tensor,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """One optimizer step: the new tensors and the new state, nothing changed in place."""
    held = {n: value for n, value in state.items() if n.startswith((ANCHOR, CORRECTION))}
    if spec.proximal:
        gradients = {
            name: gradient + spec.proximal * (trainable[name] - held[f"{ANCHOR}{name}"])
            for name, gradient in gradients.items()
        }
    if spec.scaffold:
        gradients = {
            name: gradient + held[f"{CORRECTION}{name}"] for name, gradient in gradients.items()
        }
    updated, kept = _moved(spec, trainable, gradients, state, learning_rate)
    return updated, held | kept


def _moved(
    spec: TrainingSpec,
    trainable: Named,
    gradients: Named,
    state: Named,
    learning_rate: torch.Tensor,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    if spec.optimizer == "adamw":
        return _adamw(spec, trainable, gradients, state, learning_rate)
    return _sgd(spec, trainable, gradients, state, learning_rate)


def _sgd(
    spec: TrainingSpec,
    trainable: Named,
    gradients: Named,
    state: Named,
    learning_rate: torch.Tensor,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    updated, kept = {}, {}
    for name, value in trainable.items():
        direction = gradients[name]
        if spec.weight_decay:
            direction = direction + spec.weight_decay * value
        if spec.momentum:
            direction = spec.momentum * state[f"velocity/{name}"] + direction
            kept[f"velocity/{name}"] = direction
        updated[name] = value - learning_rate * direction
    return updated, kept


def _adamw(
    spec: TrainingSpec,
    trainable: Named,
    gradients: Named,
    state: Named,
    learning_rate: torch.Tensor,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    steps = state["steps"] + 1.0
    correction_1 = 1.0 - torch.pow(BETA_1, steps)
    correction_2 = 1.0 - torch.pow(BETA_2, steps)
    updated: dict[str, torch.Tensor] = {}
    kept: dict[str, torch.Tensor] = {"steps": steps}
    for name, value in trainable.items():
        gradient = gradients[name]
        first = BETA_1 * state[f"first/{name}"] + (1.0 - BETA_1) * gradient
        second = BETA_2 * state[f"second/{name}"] + (1.0 - BETA_2) * gradient * gradient
        denominator = torch.sqrt(second / correction_2) + EPSILON
        if spec.weight_decay:
            value = value * (1.0 - learning_rate * spec.weight_decay)
        updated[name] = value - learning_rate * (first / correction_1) / denominator
        kept[f"first/{name}"], kept[f"second/{name}"] = first, second
    return updated, kept
