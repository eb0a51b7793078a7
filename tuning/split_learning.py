# SPDX-License-Identifier: Apache-2.0
"""Plain split learning, whole networks trained: what SFPrompt is to be compared with.

U-shaped split learning (Vepakomma et al. 2018, arXiv 1812.00564): clients take turns, head and
tail are theirs and go on to the next client, the body is the server's; labels stay.
SplitFed (Thapa et al. 2022, arXiv 2004.12088, algorithms 1 and 2): clients hold the head, labels
go to the server with the hidden states. In v1 the server has a copy of its part for every client,
and both parts are averaged after a round; in v2 it has one, trained by one client after another,
and only the heads are averaged.

Plain sgd, whose momentum a client keeps for a round: so v1 is federated averaging, which
`plain_split_parity` measures. Differs from the authors' code, which makes its server optimizer
anew for every batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.func import functional_call

from tuning.step import cross_entropies

if TYPE_CHECKING:
    from tuning.cuts import Part, Parts

Tensors = dict[str, torch.Tensor]
Batches = Sequence[tuple[Mapping[str, torch.Tensor], torch.Tensor]]
"""Model inputs and labels, batch after batch."""
Variant = Literal["u-shaped", "splitfed-v1", "splitfed-v2"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The network after a round, and the values that crossed the cuts."""

    weights: Tensors
    values: int  # up and down together, heads and tails that travel among them


def split_round(
    parts: Parts,
    weights: Tensors,
    clients: Sequence[Batches],
    variant: Variant,
    *,
    rate: float,
    momentum: float = 0.0,
    order: Sequence[int] | None = None,
) -> Outcome:
    """One round over all clients, each with its batches, in `order` where they take turns."""
    own = _names(parts.head) + (_names(parts.tail) if variant == "u-shaped" else [])
    device = {name: weights[name] for name in own}
    server = {name: value for name, value in weights.items() if name not in device}
    crossings = 4 if variant == "u-shaped" else 2
    carried = sum(value.numel() for value in device.values())
    values = 0
    ended: list[tuple[Tensors, Tensors, int]] = []
    for number in order or range(len(clients)):
        start = device if variant != "u-shaped" or not ended else ended[-1][0]
        behind = server if variant == "splitfed-v1" or not ended else ended[-1][1]
        trained, states = _client(parts, {**start, **behind}, clients[number], rate, momentum)
        samples = sum(len(labels) for _, labels in clients[number])
        kept = {name: trained[name] for name in device}
        rest = {name: trained[name] for name in server}
        ended.append((kept, rest, samples))
        values += crossings * states + 2 * carried
    if variant == "u-shaped":
        return Outcome(weights={**ended[-1][0], **ended[-1][1]}, values=values)
    heads = _mean([(kept, samples) for kept, _, samples in ended])
    if variant == "splitfed-v2":
        return Outcome(weights={**heads, **ended[-1][1]}, values=values)
    backs = _mean([(rest, samples) for _, rest, samples in ended])
    return Outcome(weights={**heads, **backs}, values=values)


def _client(
    parts: Parts, weights: Tensors, batches: Batches, rate: float, momentum: float
) -> tuple[Tensors, int]:
    """One client's steps, with what crosses the cuts handed over as values alone."""
    weights = dict(weights)
    velocity: Tensors = {}
    states = 0
    for batch, labels in batches:
        gradients, _, crossed = handed_over(parts, weights, batch, labels)
        states += crossed
        for name, gradient in gradients.items():
            before = velocity.get(name)
            velocity[name] = gradient if before is None else momentum * before + gradient
            weights[name] = weights[name] - rate * velocity[name]
    return weights, states


def handed_over(
    parts: Parts, weights: Tensors, batch: Mapping[str, torch.Tensor], labels: torch.Tensor
) -> tuple[Tensors, torch.Tensor, int]:
    """The loss's gradient of every weight that has one, through parts that hand over values alone;
    the loss; and how many values left the head."""
    live = {name: value.clone().requires_grad_() for name, value in weights.items()}
    masks = {name: value for name, value in batch.items() if name == "attention_mask"}

    entering = _run(parts.head, live, **batch)
    came = entering.detach().requires_grad_()
    leaving = _run(parts.body, live, hidden=came, **masks)
    back = leaving.detach().requires_grad_()
    logits = _run(parts.tail, live, hidden=back, **masks).logits
    loss = cross_entropies(logits, labels).mean()

    gradients: Tensors = {}
    (at_leaving,) = _collect(gradients, live, _names(parts.tail), loss, None, back)
    (at_entering,) = _collect(gradients, live, _names(parts.body), leaving, at_leaving, came)
    _collect(gradients, live, _names(parts.head), entering, at_entering)
    return gradients, loss.detach(), entering.numel()


def _collect(
    gradients: Tensors,
    live: Tensors,
    names: Sequence[str],
    output: torch.Tensor,
    given: torch.Tensor | None,
    *inputs: torch.Tensor,
) -> list[Any]:
    """Adds a part's gradients to those there are; gives those at its inputs."""
    if not output.requires_grad:
        return list(inputs)
    wanted = [*inputs, *(live[name] for name in names)]
    found = torch.autograd.grad(output, wanted, given, allow_unused=True)
    for name, gradient in zip(names, found[len(inputs) :], strict=True):
        if gradient is not None:
            gradients[name] = gradient
    return list(found[: len(inputs)])


def _names(part: Part) -> list[str]:
    return [name.removeprefix("model.") for name, _ in part.named_parameters()]


def _run(part: Part, weights: Tensors, **inputs: Any) -> Any:
    own = {f"model.{name}": weights[name] for name in _names(part)}
    return functional_call(part, own, args=(), kwargs=inputs)


def _mean(of: Sequence[tuple[Tensors, int]]) -> Tensors:
    total = sum(samples for _, samples in of)
    return {
        name: sum(samples / total * tensors[name] for tensors, samples in of) for name in of[0][0]
    }
