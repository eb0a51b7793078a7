# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from protocol.manifest import TrainingSpec
from tuning import optimizers


def spec_of(name: str, momentum: float, decay: float) -> TrainingSpec:
    return TrainingSpec(
        batch_size=1,
        optimizer=name,  # type: ignore[arg-type]
        learning_rate=0.1,
        momentum=momentum,
        weight_decay=decay,
    )


@pytest.mark.parametrize(
    ("name", "momentum", "decay"),
    [("sgd", 0.0, 0.0), ("sgd", 0.9, 0.0), ("sgd", 0.9, 0.05), ("sgd", 0.0, 0.05),
     ("adamw", 0.0, 0.0), ("adamw", 0.0, 0.05)],
)  # fmt: skip
def test_ten_steps_equal_torch_optim(name: str, momentum: float, decay: float) -> None:
    spec = spec_of(name, momentum, decay)
    generator = torch.Generator().manual_seed(1)
    start = {"a": torch.randn(4, 3, generator=generator), "b": torch.randn(5, generator=generator)}
    held = {key: value.clone().requires_grad_() for key, value in start.items()}
    reference: torch.optim.Optimizer
    if name == "adamw":
        reference = torch.optim.AdamW(
            held.values(), lr=0.02, weight_decay=decay, eps=optimizers.EPSILON
        )
    else:
        reference = torch.optim.SGD(held.values(), lr=0.02, momentum=momentum, weight_decay=decay)
    tensors, state = dict(start), optimizers.initial_state(spec, start)
    for _ in range(10):
        gradients = {k: torch.randn(v.shape, generator=generator) for k, v in start.items()}
        tensors, state = optimizers.step(spec, tensors, gradients, state, torch.tensor(0.02))
        for key, value in held.items():
            value.grad = gradients[key].clone()
        reference.step()
    for key, value in tensors.items():
        torch.testing.assert_close(value, held[key].detach(), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "momentum", "names"),
    [
        ("sgd", 0.0, set()),
        ("sgd", 0.9, {"velocity/a"}),
        ("adamw", 0.0, {"first/a", "second/a", "steps"}),
    ],
)
def test_state_has_no_more_than_the_optimizer_needs(
    name: str, momentum: float, names: set[str]
) -> None:
    spec = spec_of(name, momentum, 0.0)
    tensors = {"a": torch.ones(3)}
    state = optimizers.initial_state(spec, tensors)
    assert set(state) == names
    assert all(bool((value == 0).all()) for value in state.values())
    _, kept = optimizers.step(spec, tensors, {"a": torch.ones(3)}, state, torch.tensor(0.1))
    assert set(kept) == names
    assert all(bool((value == 0).all()) for value in state.values()), "changed in place"


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_proximal_steps_are_those_on_the_loss_with_the_added_term(name: str) -> None:
    spec = replace(spec_of(name, 0.0, 0.0), proximal=0.7)
    plain = spec_of(name, 0.0, 0.0)
    start = {"a": torch.tensor([1.0, -2.0, 0.5])}
    tensors, state = dict(start), optimizers.initial_state(spec, start)
    expected, expected_state = dict(start), optimizers.initial_state(plain, start)
    rate = torch.tensor(0.1)
    for _ in range(5):
        # The gradient of sum(w^4) / 4 + mu / 2 * |w - w0|^2, by autograd.
        held = expected["a"].clone().requires_grad_()
        loss = held.pow(4).sum() / 4 + 0.7 / 2 * (held - start["a"]).square().sum()
        (gradient,) = torch.autograd.grad(loss, [held])
        expected, expected_state = optimizers.step(
            plain, expected, {"a": gradient}, expected_state, rate
        )
        tensors, state = optimizers.step(spec, tensors, {"a": tensors["a"] ** 3}, state, rate)
    torch.testing.assert_close(tensors["a"], expected["a"], rtol=0, atol=1e-6)
    assert torch.equal(state["anchor/a"], start["a"])
    assert not torch.allclose(tensors["a"], start["a"])


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_correction_is_added_to_every_gradient_and_kept(decay: float) -> None:
    spec = replace(spec_of("sgd", 0.0, decay), scaffold=True)
    correction = torch.tensor([0.5, -0.25, 0.0])
    start = {"a": torch.tensor([1.0, -2.0, 0.5])}
    state = optimizers.initial_state(spec, start)
    assert set(state) == {"correction/a"} and not state["correction/a"].any()
    state = {"correction/a": correction}
    tensors, expected = dict(start), start["a"].clone().requires_grad_()
    reference = torch.optim.SGD([expected], lr=0.1, weight_decay=decay)
    for _ in range(4):
        tensors, state = optimizers.step(
            spec, tensors, {"a": tensors["a"] ** 3}, state, torch.tensor(0.1)
        )
        reference.zero_grad()
        # The correction as a linear term of the loss.
        (expected.pow(4).sum() / 4 + (expected * correction).sum()).backward()
        reference.step()
    torch.testing.assert_close(tensors["a"], expected.detach(), rtol=0, atol=1e-6)
    assert torch.equal(state["correction/a"], correction)


def test_tensor_without_a_gradient_keeps_still_under_adamw() -> None:
    spec = spec_of("adamw", 0.0, 0.0)
    tensors = {"a": torch.tensor([1.0, -2.0])}
    state = optimizers.initial_state(spec, tensors)
    updated, _ = optimizers.step(spec, tensors, {"a": torch.zeros(2)}, state, torch.tensor(0.1))
    assert torch.equal(updated["a"], tensors["a"])
