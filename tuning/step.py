# SPDX-License-Identifier: Apache-2.0
"""The training step, the evaluation and the cohort of clients as pure functions of named tensors.

Everything that trains, on any engine, is one of these functions: run as it is by torch, or traced
by the compiler and run by onnxruntime.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.func import functional_call, grad_and_value, vmap

from protocol.manifest import SUMMED, TALLY
from tuning import optimizers

if TYPE_CHECKING:
    from protocol.manifest import TrainingSpec
    from tuning.methods import Tuned

Named = Mapping[str, torch.Tensor]
Step = Callable[
    [Named, Named, Named, Named, torch.Tensor, torch.Tensor, torch.Tensor],
    tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor],
]
Evaluation = Callable[
    [Named, Named, Named, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]
]


def answer(
    tuned: Tuned,
    trainable: Named,
    frozen: Named,
    batch: Named,
    features: torch.Tensor | None = None,
) -> Any:
    """What the network with the given tensors says of one batch: `.logits` [B, classes].

    `features` are what `tuned.features` names of this batch, where they are known already.
    """
    inside = {tuned.trainable[name]: value for name, value in trainable.items()}
    prepared = dict(tuned.prepare(batch))
    if features is not None:
        prepared[tuned.features] = features
    return functional_call(tuned.module, {**frozen, **inside}, args=(), kwargs=prepared)


def logits(tuned: Tuned, trainable: Named, frozen: Named, batch: Named) -> torch.Tensor:
    """Class scores [B, classes] of one batch with the given tensors in the network."""
    scores: torch.Tensor = answer(tuned, trainable, frozen, batch).logits
    return scores


def initial_state(tuned: Tuned, spec: TrainingSpec) -> dict[str, torch.Tensor]:
    """What a step reads before the first: the optimizer's state, and beside it at zero tallies, or
    of a private step, which counts nothing, its sum."""
    parameters = tuned.parameters()
    if spec.privacy is not None:
        beside = {SUMMED: torch.zeros(sum(value.numel() for value in parameters.values()))}
    else:
        beside = {f"{TALLY}{name}": torch.zeros(size) for name, size in tuned.tallies.items()}
    return optimizers.initial_state(spec, parameters) | beside


def cross_entropies(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every sample: scores [B, C] and labels [B] -> [B], in nats.

    Written with a one-hot product instead of a gather: its gradient needs no scatter.
    """
    classes = torch.arange(scores.shape[-1], device=scores.device)
    chosen = (labels.unsqueeze(-1) == classes).to(scores.dtype)
    return torch.logsumexp(scores, dim=-1) - (scores * chosen).sum(dim=-1)


def training_step(tuned: Tuned, spec: TrainingSpec) -> Step:
    """One step of one client, as `step(trainable, state, frozen, batch, labels, weight, rate)`.

    `weight` [B] makes a ragged batch exact: the loss is sum(weight * ce) / sum(weight), and a
    padding sample has weight 0. At least one weight must be above 0. Tallies add up in the state.

    Returns:
        The new trainable tensors, the new optimizer state, and the loss before the step.
    """

    def step(
        trainable: Named,
        state: Named,
        frozen: Named,
        batch: Named,
        labels: torch.Tensor,
        weight: torch.Tensor,
        learning_rate: torch.Tensor,
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]:
        share = weight / weight.sum()

        def loss_of(tensors: Named) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            found = answer(tuned, tensors, frozen, batch)
            losses = tuned.sample_loss(cross_entropies(found.logits, labels), found)
            counted = {name: (weight @ getattr(found, name)).detach() for name in tuned.tallies}
            return (share * losses).sum(), counted

        gradients, (loss, counted) = grad_and_value(loss_of, has_aux=True)(dict(trainable))
        tallies = {f"{TALLY}{n}": state[f"{TALLY}{n}"] + count for n, count in counted.items()}
        state = {name: value for name, value in state.items() if name not in tallies}
        updated, kept = optimizers.step(spec, trainable, gradients, state, learning_rate)
        return updated, kept | tallies, loss

    return step


def cohort_step(tuned: Tuned, spec: TrainingSpec) -> Step:
    """The step of many clients at once: every tensor but `frozen` has a leading client axis.

    A client whose weights are all 0 has no batch left in this step: its tensors and its state
    come back as they went in, and its loss is 0.
    """
    one = training_step(tuned, spec)

    def masked(
        trainable: Named,
        state: Named,
        frozen: Named,
        batch: Named,
        labels: torch.Tensor,
        weight: torch.Tensor,
        learning_rate: torch.Tensor,
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]:
        active = weight.sum() > 0
        # An idle client trains on equal weights, whose result is then dropped: no 0 / 0.
        weight = torch.where(active, weight, torch.ones_like(weight))
        updated, kept, loss = one(trainable, state, frozen, batch, labels, weight, learning_rate)
        updated = {name: torch.where(active, new, trainable[name]) for name, new in updated.items()}
        kept = {name: torch.where(active, new, state[name]) for name, new in kept.items()}
        return updated, kept, torch.where(active, loss, torch.zeros_like(loss))

    return vmap(masked, in_dims=(0, 0, None, 0, 0, 0, None))


def evaluation(tuned: Tuned) -> Evaluation:
    """Of every sample: (trainable, frozen, batch, labels) -> cross-entropy, correctness, logits.

    Values a sample, not sums: whoever evaluates decides which samples belong together.
    """

    def evaluate(
        trainable: Named, frozen: Named, batch: Named, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scores = logits(tuned, trainable, frozen, batch)
        correct = (scores.argmax(dim=-1) == labels).to(scores.dtype)
        return cross_entropies(scores, labels), correct, scores

    return evaluate
