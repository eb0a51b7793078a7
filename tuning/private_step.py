# SPDX-License-Identifier: Apache-2.0
"""DP-SGD: the training step whose result one sample can change only so much, and with noise.

*Source* Abadi et al. 2016, "Deep Learning with Differential Privacy" (CCS, arXiv 1607.00133),
algorithm 1. With drawn samples i, their gradients g_i over all trained tensors together, C the
clip, z the noise multiplier and B the expected batch:

    sum   = sum over i of w_i * g_i * C / max(|g_i|, C)
    g     = (sum + z * C * noise) / B

and the optimizer takes g for the gradient. Weight decay, momentum, Adam's moments and FedProx's
pull work on g: they read no sample, and so cost no privacy.

*Differs from source* The noise is an input of the step, standard normal values: whoever runs the
step draws them, securely. The samples of one step may come in several calls, since a compiled step
has one batch shape and a Poisson draw has any size: a call with `applies` 0 adds to the sum in the
state ("summed") and changes nothing else, and the call with `applies` 1 adds its own, takes the
noise and steps. A call without samples is a step of noise alone, as it is accounted for. `trained`,
1 or 0, says whose gradients count: those of tensors that a round leaves as they are would only use
up the norm. C / max(|g|, C) in place of 1 / max(1, |g| / C): the same number, and no quotient that
a gradient of zero could spoil.

Sum, noise and `trained` are vectors of all d values, tensor after tensor in the order of their
sorted names: one operation each in the graph, where a network has a hundred tensors.

A gradient that is not finite makes the tensors NaN, and the update is then refused; nothing is
replaced by zero. Norms and sums are float32: a sample's norm may exceed C by some 1e-6 of it.

*Cost* gradients of every sample at once: B times the trained values in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.func import grad_and_value, vmap

from protocol.manifest import SUMMED
from tuning import optimizers
from tuning.step import Named, answer, cross_entropies

if TYPE_CHECKING:
    from protocol.manifest import TrainingSpec
    from tuning.methods import Tuned

PrivateStep = Callable[
    [
        Named, Named, Named, Named, torch.Tensor, torch.Tensor,
        torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor,
    ],
    tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor],
]  # fmt: skip


def clipped_sum(
    tuned: Tuned,
    clip: float,
    trainable: Named,
    frozen: Named,
    batch: Named,
    labels: torch.Tensor,
    weight: torch.Tensor,
    trained: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the samples of a batch add to a step's sum [d], and their losses [B].

    `weight` [B] is 1 for a sample that was drawn and 0 for padding.
    """

    def alone(sample: Named, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch_of_one = {name: value.unsqueeze(0) for name, value in sample.items()}

        def loss_of(tensors: Named) -> torch.Tensor:
            found = answer(tuned, tensors, frozen, batch_of_one)
            entropies = cross_entropies(found.logits, label.unsqueeze(0))
            return tuned.sample_loss(entropies, found).sum()

        gradients, loss = grad_and_value(loss_of)(dict(trainable))
        return torch.cat([gradients[name].reshape(-1) for name in sorted(gradients)]), loss

    each, losses = vmap(alone)(dict(batch), labels)
    each = each * trained
    norms = each.square().sum(dim=1).sqrt()
    return (weight * clip / torch.clamp(norms, min=clip)) @ each, losses


def private_step(tuned: Tuned, spec: TrainingSpec) -> PrivateStep:
    """One call of one client, as `step(trainable, state, frozen, batch, labels, weight, noise,
    applies, trained, rate)`.

    Returns:
        The new trainable tensors, the new state, and the mean loss of the call's samples before
        the step, 0 where there are none. The loss is not private: it stays where it is computed.
    """
    privacy = spec.privacy
    assert privacy is not None, "a step without clip and noise is training_step"
    deviation = privacy.noise_multiplier * privacy.clip

    def step(
        trainable: Named,
        state: Named,
        frozen: Named,
        batch: Named,
        labels: torch.Tensor,
        weight: torch.Tensor,
        noise: torch.Tensor,
        applies: torch.Tensor,
        trained: torch.Tensor,
        learning_rate: torch.Tensor,
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]:
        added, losses = clipped_sum(
            tuned, privacy.clip, trainable, frozen, batch, labels, weight, trained
        )
        total = state[SUMMED] + added
        names = sorted(trainable)
        noisy = (total + deviation * noise) / spec.batch_size
        parts = noisy.split([trainable[name].numel() for name in names])
        gradients = {
            name: part.reshape(trainable[name].shape)
            for name, part in zip(names, parts, strict=True)
        }
        before = {name: value for name, value in state.items() if name != SUMMED}
        moved, kept = optimizers.step(spec, trainable, gradients, before, learning_rate)
        takes = applies > 0
        updated = {name: torch.where(takes, new, trainable[name]) for name, new in moved.items()}
        after = {name: torch.where(takes, new, before[name]) for name, new in kept.items()}
        after[SUMMED] = torch.where(takes, torch.zeros_like(total), total)
        loss = (weight * losses).sum() / torch.clamp(weight.sum(), min=1.0)
        return updated, after, loss

    return step


def private_cohort_step(tuned: Tuned, spec: TrainingSpec) -> PrivateStep:
    """The step of many clients at once: every tensor but `frozen`, `trained` and the rate has a
    leading client axis.

    A client whose weights are all 0 and that does not apply has no call left: nothing of it
    changes.
    """
    return vmap(private_step(tuned, spec), in_dims=(0, 0, None, 0, 0, 0, 0, 0, None, None))
