# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.errors import MergeError
from aggregation.server_optimizers import FedAdam
from protocol.tensors import ParamSpec


def _oracle(
    start: float, deltas: list[float], rate: float, beta_1: float, beta_2: float, tau: float
) -> float:
    """One value, literally: Reddi et al. 2021, algorithm 2, with Adam's bias correction."""
    x, m, v = start, 0.0, 0.0
    for t, delta in enumerate(deltas, start=1):
        m = beta_1 * m + (1 - beta_1) * delta
        v = beta_2 * v + (1 - beta_2) * delta * delta
        x += rate * (m / (1 - beta_1**t)) / (math.sqrt(v / (1 - beta_2**t)) + tau)
        x = float(np.float32(x))
    return x


@given(
    deltas=st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=8),
    rate=st.floats(1e-4, 0.5),
    beta_1=st.floats(0, 0.99),
    beta_2=st.floats(0, 0.999),
)
def test_step_equals_the_literal_algorithm(
    deltas: list[float], rate: float, beta_1: float, beta_2: float
) -> None:
    optimizer = FedAdam(learning_rate=rate, beta_1=beta_1, beta_2=beta_2, adaptivity=1e-3)
    tensors = {"a": np.array([0.5, -0.25], np.float32)}
    state = optimizer.init(ParamSpec.of(tensors))
    for delta in deltas:
        state, tensors = optimizer.step(state, tensors, {"a": np.array([delta, 0], np.float32)})
    assert tensors["a"][0] == pytest.approx(
        _oracle(0.5, deltas, rate, beta_1, beta_2, 1e-3), abs=1e-6
    )
    assert tensors["a"][1] == np.float32(-0.25)


def test_first_step_has_the_size_of_the_learning_rate_whatever_the_change() -> None:
    optimizer = FedAdam(learning_rate=0.01, adaptivity=1e-12)
    tensors = {"a": np.zeros(3, np.float32)}
    delta = {"a": np.array([1e-4, -3.0, 50.0], np.float32)}
    _, stepped = optimizer.step(optimizer.init(ParamSpec.of(tensors)), tensors, delta)
    np.testing.assert_allclose(stepped["a"], [0.01, -0.01, 0.01], rtol=1e-5)


def test_arguments_and_state_are_not_changed() -> None:
    optimizer = FedAdam()
    tensors = {"a": np.ones(3, np.float32)}
    delta = {"a": np.full(3, 0.5, np.float32)}
    state = optimizer.init(ParamSpec.of(tensors))
    before = {name: value.copy() for name, value in state.moments.items()}
    optimizer.step(state, tensors, delta)
    assert (tensors["a"] == 1).all()
    assert (delta["a"] == 0.5).all()
    assert all((state.moments[name] == value).all() for name, value in before.items())


@pytest.mark.parametrize(
    "settings",
    [{"learning_rate": 0.0}, {"adaptivity": 0.0}, {"beta_1": 1.0}, {"beta_2": -0.1}],
)
def test_setting_outside_its_range_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(MergeError, match="expected"):
        FedAdam(**settings)


def test_change_that_does_not_fit_is_refused() -> None:
    optimizer = FedAdam()
    tensors = {"a": np.ones(3, np.float32)}
    state = optimizer.init(ParamSpec.of(tensors))
    with pytest.raises(MergeError, match="mean delta"):
        optimizer.step(state, tensors, {"a": np.ones(4, np.float32)})
