# SPDX-License-Identifier: Apache-2.0
"""The pieces of a split training step as pure functions of named tensors.

Put after one another they are `training_step` of the whole network, with head and body frozen:
`head_forward`, the server's `body_forward`, `tail_step`, the server's way back (the second half of
`body_there_and_back`), `prompt_step`. The device has all but the server's two. `training_step` of
`short_way` is the step of SFPrompt's local-loss phase (arXiv 2407.17533), and `el2n_scores` what it
prunes by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.func import functional_call, grad_and_value, vjp

from tuning import optimizers
from tuning.step import Named, cross_entropies

if TYPE_CHECKING:
    from protocol.manifest import TrainingSpec
    from tuning.cuts import Part, Parts
    from tuning.methods import Tuned

Masks = Mapping[str, torch.Tensor]
"""{"attention_mask": [B, 1, 1, T]} as the parts take it, for texts; {} for images."""


def parts_of(tuned: Tuned) -> Parts:
    """The parts of a module that is trained split."""
    assert tuned.parts is not None, "only methods that cut the network are trained split"
    return tuned.parts


def short_way(tuned: Tuned) -> Tuned:
    """Head and tail without the body, to be trained as any module is."""
    return replace(tuned, module=parts_of(tuned).short, parts=None)


def of_part(tuned: Tuned, part: Part) -> dict[str, str]:
    """The trainable tensors that a part holds: public name -> parameter name in the network."""
    held = {name.removeprefix("model.") for name, _ in part.named_parameters()}
    return {name: inside for name, inside in tuned.trainable.items() if inside in held}


def frozen_of(tuned: Tuned, part: Part) -> dict[str, torch.Tensor]:
    """What a part has of frozen weights, by their names in the network."""
    trained = set(tuned.trainable.values())
    return {name: value for name, value in part.weights().items() if name not in trained}


def state_of(state: Named, names: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The optimizer's state of some tensors, with what is common to all."""
    return {
        name: value
        for name, value in state.items()
        if "/" not in name or name.partition("/")[2] in names
    }


def head_forward(tuned: Tuned, trainable: Named, frozen: Named, batch: Named) -> torch.Tensor:
    """Hidden states [B, T, D] that leave the device: of a batch, with the prompt in it."""
    return _run(tuned, parts_of(tuned).head, trainable, frozen, **tuned.prepare(batch))


def body_forward(tuned: Tuned, frozen: Named, hidden: torch.Tensor, masks: Masks) -> torch.Tensor:
    """What the server makes of them, [B, T, D], or [B, 1, D] where it pools."""
    return _run(tuned, parts_of(tuned).body, {}, frozen, hidden=hidden, **masks)


def body_there_and_back(
    tuned: Tuned, frozen: Named, hidden: torch.Tensor, masks: Masks, gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What leaves the body, and the loss's gradient at what entered it, [B, T, D], from that at
    what left."""
    left, backward = vjp(lambda entering: body_forward(tuned, frozen, entering, masks), hidden)
    (entered,) = backward(gradient)
    return left, entered


def tail_answer(
    tuned: Tuned,
    trainable: Named,
    frozen: Named,
    hidden: torch.Tensor,
    masks: Masks,
    labels: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of every sample: cross-entropy [B], correctness [B], logits [B, C]."""
    scores = _run(tuned, parts_of(tuned).tail, trainable, frozen, hidden=hidden, **masks).logits
    correct = (scores.argmax(dim=-1) == labels).to(scores.dtype)
    return cross_entropies(scores, labels), correct, scores


def tail_step(
    tuned: Tuned,
    spec: TrainingSpec,
    trainable: Named,
    state: Named,
    frozen: Named,
    hidden: torch.Tensor,
    masks: Masks,
    labels: torch.Tensor,
    weight: torch.Tensor,
    learning_rate: torch.Tensor,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """One step of the tail; arguments as of `training_step`.

    Returns: the new tail, its new state, the loss before the step, and the loss's gradient at the
    hidden states that entered, in their shape.
    """
    share = weight / weight.sum()

    def loss_of(tail: Named, entering: torch.Tensor) -> torch.Tensor:
        losses, _, _ = tail_answer(tuned, tail, frozen, entering, masks, labels)
        return (share * losses).sum()

    (gradients, entered), loss = grad_and_value(loss_of, argnums=(0, 1))(dict(trainable), hidden)
    updated, kept = optimizers.step(spec, trainable, gradients, state, learning_rate)
    return updated, kept, loss, entered


def prompt_step(
    tuned: Tuned,
    spec: TrainingSpec,
    trainable: Named,
    state: Named,
    frozen: Named,
    batch: Named,
    gradient: torch.Tensor,
    learning_rate: torch.Tensor,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """One step of the prompt, from the loss's gradient at what left the head, [B, T, D]."""
    _, backward = vjp(lambda prompt: head_forward(tuned, prompt, frozen, batch), dict(trainable))
    (gradients,) = backward(gradient)
    return optimizers.step(spec, trainable, gradients, state, learning_rate)


def el2n_scores(
    tuned: Tuned, trainable: Named, frozen: Named, batch: Named, labels: torch.Tensor
) -> torch.Tensor:
    """Length of softmax(logits) - onehot(label) of every sample, [B], from 0 to sqrt(2).

    Source: Paul, Ganguli and Dziugaite 2021, arXiv 2107.07075, definition 2.3; here of one
    network, on the short way without the prompt, as SFPrompt's figure has it.
    """
    inside = {tuned.trainable[name]: value for name, value in trainable.items()}
    module = parts_of(tuned).scoring
    logits = functional_call(module, {**frozen, **inside}, args=(), kwargs=dict(batch)).logits
    classes = torch.arange(logits.shape[-1], device=logits.device)
    wanted = (labels.unsqueeze(-1) == classes).to(logits.dtype)
    difference = torch.softmax(logits, dim=-1) - wanted
    return torch.sqrt((difference * difference).sum(dim=-1))


def _run(tuned: Tuned, part: nn.Module, trainable: Named, frozen: Named, **inputs: Any) -> Any:
    inside = {tuned.trainable[name]: value for name, value in trainable.items()}
    weights = {f"model.{name}": value for name, value in {**frozen, **inside}.items()}
    return functional_call(part, weights, args=(), kwargs=inputs)
