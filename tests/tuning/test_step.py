# SPDX-License-Identifier: Apache-2.0
"""The pure step, untraced: batches weighted exactly, and many clients as each alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from protocol.manifest import TrainingSpec
from tuning import optimizers
from tuning.ports import example_batch
from tuning.recipe import Recipe
from tuning.step import cohort_step, cross_entropies, evaluation, logits, training_step

METHODS: Mapping[str, Mapping[str, Any]] = {
    "full": {},
    "head": {},
    "lora": {"rank": 2},
    "lora-sb": {"rank": 2},
    "ssf": {},
    "adapter": {"width": 3},
    "one-bit-adapter": {"width": 3},
    "one-bit-lora": {"rank": 2},
    "prompt": {"length": 2},
    "peft": {"type": "LOHA", "r": 2, "alpha": 4},
}
# Softmax does not see what is added to every score: the true gradient is zero, the computed one is
# rounding, and Adam divides it by itself.
SHIFTS_NOTHING = ("k_proj.bias", "k_proj.shift")
CLIENTS, BATCH = 3, 4
Named = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Ready:
    tuned: Any
    spec: TrainingSpec
    trainable: Named
    state: Named
    batch: Named
    labels: torch.Tensor

    def of(self, client: int) -> tuple[Named, Named, Named, torch.Tensor]:
        """One client's part of tensors, state, batch and labels."""
        parts = ({n: v[client] for n, v in d.items()} for d in (self.trainable, self.state))
        batch = {name: value[client] for name, value in self.batch.items()}
        return (*parts, batch, self.labels[client])  # type: ignore[return-value]


@pytest.fixture(scope="module")
def ready(tiny_vit: Path, tiny_bert: Path) -> Callable[..., Ready]:
    """A method on a tiny backbone, with different tensors and data for each of 3 clients."""

    def make(method: str, *, kind: str = "image", optimizer: str = "sgd") -> Ready:
        sgd = optimizer == "sgd"
        spec = TrainingSpec(
            batch_size=BATCH,
            optimizer="sgd" if sgd else "adamw",
            learning_rate=0.1,
            momentum=0.9 if sgd else 0.0,
            weight_decay=0.01,
        )
        recipe = Recipe(
            backbone=tiny_vit if kind == "image" else tiny_bert,
            classes=5,
            seed=0,
            method=method,
            settings=METHODS[method],
            training=spec,
            max_length=8,
        )
        backbone, tuned = recipe.build()
        generator = torch.Generator().manual_seed(3)

        def stirred(named: Named) -> Named:
            return {
                name: value + 0.2 * torch.randn(CLIENTS, *value.shape, generator=generator)
                for name, value in named.items()
            }

        state = optimizers.initial_state(spec, tuned.parameters())
        many = {n: v.repeat(CLIENTS, *[1] * v.dim()) for n, v in state.items()}
        batch = stirred(example_batch(backbone, BATCH))
        if kind == "text":
            batch["input_ids"] = torch.randint(4, 14, (CLIENTS, BATCH, 8), generator=generator)
            mask = torch.zeros(CLIENTS, BATCH, 1, 1, 8)
            mask[:, 1, ..., 5:] = -10000.0
            mask[:, 2, ..., 2:] = -10000.0
            batch["attention_mask"] = mask
        labels = torch.randint(0, 5, (CLIENTS, BATCH), generator=generator)
        return Ready(tuned, spec, stirred(tuned.parameters()), many, batch, labels)

    return make


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("method", METHODS)
def test_cohort_step_equals_each_client_alone(
    ready: Callable[..., Ready], method: str, optimizer: str
) -> None:
    case = ready(method, optimizer=optimizer)
    frozen, rate = case.tuned.frozen(), torch.tensor(0.1 if optimizer == "sgd" else 0.002)
    weight = torch.ones(CLIENTS, BATCH)
    weight[1, 2:] = 0
    together = cohort_step(case.tuned, case.spec)
    alone = training_step(case.tuned, case.spec)
    tensors, state, losses = together(
        case.trainable, case.state, frozen, case.batch, case.labels, weight, rate
    )
    tensors, state, losses = together(tensors, state, frozen, case.batch, case.labels, weight, rate)
    # Adam divides a gradient by its own size, and with it what rounding makes of a small one: a
    # hundredth of a step is allowed.
    near = 1e-5 if optimizer == "sgd" else 4e-5
    for client in range(CLIENTS):
        own, kept, batch, labels = case.of(client)
        for _ in range(2):
            own, kept, loss = alone(own, kept, frozen, batch, labels, weight[client], rate)
        assert float(losses[client]) == pytest.approx(float(loss), abs=1e-5)
        for name, value in own.items():
            if optimizer == "adamw" and name.endswith(SHIFTS_NOTHING):
                continue
            torch.testing.assert_close(tensors[name][client], value, rtol=0, atol=near)
        for name, value in kept.items():
            torch.testing.assert_close(state[name][client], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_idle_client_keeps_every_bit_when_its_weights_are_zero(
    ready: Callable[..., Ready], method: str
) -> None:
    case = ready(method)
    weight = torch.ones(CLIENTS, BATCH)
    weight[2] = 0
    state = {name: value + 0.5 for name, value in case.state.items()}
    tensors, kept, losses = cohort_step(case.tuned, case.spec)(
        case.trainable, state, case.tuned.frozen(), case.batch, case.labels, weight,
        torch.tensor(0.1),
    )  # fmt: skip
    assert float(losses[2]) == 0.0
    for name, value in tensors.items():
        assert torch.equal(value[2], case.trainable[name][2])
        assert not torch.equal(value[0], case.trainable[name][0])
    for name, value in kept.items():
        assert torch.equal(value[2], state[name][2])


def test_idle_client_stays_finite_when_its_data_are_not(ready: Callable[..., Ready]) -> None:
    case = ready("lora")
    weight = torch.ones(CLIENTS, BATCH)
    weight[1] = 0
    case.batch["pixel_values"][1] = float("nan")
    tensors, _, losses = cohort_step(case.tuned, case.spec)(
        case.trainable, case.state, case.tuned.frozen(), case.batch, case.labels, weight,
        torch.tensor(0.1),
    )  # fmt: skip
    assert torch.isfinite(losses).all()
    for name, value in tensors.items():
        assert torch.equal(value[1], case.trainable[name][1])


@pytest.mark.parametrize("kind", ["image", "text"])
def test_weighted_loss_is_the_mean_of_the_samples_that_count(
    ready: Callable[..., Ready], kind: str
) -> None:
    case = ready("head", kind=kind)
    own, kept, batch, labels = case.of(0)
    frozen = case.tuned.frozen()
    weight = torch.tensor([1.0, 0.0, 1.0, 0.0])
    step = training_step(case.tuned, case.spec)
    updated, _, loss = step(own, kept, frozen, batch, labels, weight, torch.tensor(0.1))
    rows = torch.tensor([0, 2])
    short = {name: value[rows] for name, value in batch.items()}
    scores = logits(case.tuned, own, frozen, short)
    torch.testing.assert_close(
        loss, torch.nn.functional.cross_entropy(scores, labels[rows]), rtol=0, atol=1e-6
    )
    expected, _, _ = step(own, kept, frozen, short, labels[rows], torch.ones(2), torch.tensor(0.1))
    for name, value in updated.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)


def test_step_leaves_its_arguments_as_they_were(ready: Callable[..., Ready]) -> None:
    case = ready("lora")
    own, kept, batch, labels = case.of(0)
    before = {name: value.clone() for name, value in (own | kept | batch).items()}
    training_step(case.tuned, case.spec)(
        own, kept, case.tuned.frozen(), batch, labels, torch.ones(BATCH), torch.tensor(0.1)
    )
    for name, value in (own | kept | batch).items():
        assert torch.equal(value, before[name])


def test_cross_entropies_equal_torch_when_scores_are_extreme() -> None:
    scores = torch.tensor([[80.0, -80.0, 0.0], [-200.0, 3.0, 3.0], [0.0, 0.0, 0.0]])
    labels = torch.tensor([1, 2, 0])
    expected = torch.nn.functional.cross_entropy(scores, labels, reduction="none")
    torch.testing.assert_close(cross_entropies(scores, labels), expected)


def test_evaluation_gives_figures_of_every_sample(ready: Callable[..., Ready]) -> None:
    case = ready("prompt", kind="text")
    own, _, batch, labels = case.of(1)
    losses, correct, found = evaluation(case.tuned)(own, case.tuned.frozen(), batch, labels)
    scores = logits(case.tuned, own, case.tuned.frozen(), batch).detach()
    torch.testing.assert_close(found.detach(), scores)
    expected = torch.nn.functional.cross_entropy(scores, labels, reduction="none")
    torch.testing.assert_close(losses.detach(), expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(correct, (scores.argmax(-1) == labels).float())
