# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.errors import MergeError
from aggregation.server_optimizers.adagrad import FedAdagrad
from protocol import ParamSpec

DELTAS = st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=8)


def oracle(deltas, rate, beta_1, tau, initial, correct) -> float:
    """One value, literally: Reddi et al. 2021, algorithm 2, FedAdagrad."""
    x, m, v = 0.5, 0.0, initial
    for t, delta in enumerate(deltas, start=1):
        m = beta_1 * m + (1 - beta_1) * delta
        v = v + delta * delta
        first = m / (1 - beta_1**t) if correct else m
        x = float(np.float32(x + rate * first / (math.sqrt(v) + tau)))
    return x


def found(optimizer, deltas) -> float:
    tensors = {"a": np.array([0.5, -0.25], np.float32)}
    state = optimizer.init(ParamSpec.of(tensors))
    for delta in deltas:
        state, tensors = optimizer.step(state, tensors, {"a": np.array([delta, 0], np.float32)})
    assert tensors["a"][1] == np.float32(-0.25)
    return float(tensors["a"][0])


@given(DELTAS, st.floats(1e-4, 0.5), st.floats(0, 0.99), st.floats(0, 1), st.booleans())
def test_step_equals_the_literal_algorithm(deltas, rate, beta_1, initial, correct):
    optimizer = FedAdagrad(
        learning_rate=rate, beta_1=beta_1, initial=initial, bias_correction=correct
    )
    expected = oracle(deltas, rate, beta_1, 1e-3, initial, correct)
    assert found(optimizer, deltas) == pytest.approx(expected, abs=1e-6)


def test_steps_of_equal_changes_shrink_as_the_root_of_the_round():
    optimizer = FedAdagrad(learning_rate=1.0, adaptivity=1e-9, initial=0.0)
    tensors = {"a": np.zeros(1)}
    state = optimizer.init(ParamSpec.of(tensors))
    for number in range(1, 6):
        before = tensors["a"][0]
        state, tensors = optimizer.step(state, tensors, {"a": np.array([0.2])})
        assert tensors["a"][0] - before == pytest.approx(1 / math.sqrt(number), rel=1e-6)


def test_arguments_and_state_are_not_changed():
    optimizer = FedAdagrad()
    tensors = {"a": np.ones(3, np.float32), "s": np.array(1, np.float32)}
    delta = {"a": np.full(3, 0.5, np.float32), "s": np.array(0.5, np.float32)}
    state = optimizer.init(ParamSpec.of(tensors))
    before = {name: value.tobytes() for name, value in state.moments.items()}
    after, stepped = optimizer.step(state, tensors, delta)
    assert (tensors["a"] == 1).all() and (delta["a"] == 0.5).all()
    assert {name: value.tobytes() for name, value in state.moments.items()} == before
    assert ParamSpec.of(tensors).mismatch(stepped) is None
    assert all(isinstance(value, np.ndarray) for value in after.moments.values())
    assert after.moments["steps"] == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": 0.0},
        {"adaptivity": 0.0},
        {"beta_1": 1.0},
        {"initial": -1e-6},
        {"initial": np.nan},
    ],
)
def test_a_setting_outside_its_range_is_refused(settings):
    with pytest.raises(MergeError, match="expected"):
        FedAdagrad(**settings)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e200])
def test_a_change_that_is_not_finite_or_whose_square_is_not_is_refused(value):
    tensors = {"a": np.ones(3)}
    optimizer = FedAdagrad()
    with pytest.raises(MergeError, match='tensor "a"'):
        optimizer.step(
            optimizer.init(ParamSpec.of(tensors)), tensors, {"a": np.array([1.0, value, 1.0])}
        )


def test_what_does_not_fit_is_refused():
    optimizer = FedAdagrad()
    good, bad = {"a": np.ones(3, np.float32)}, {"a": np.ones(4, np.float32)}
    state = optimizer.init(ParamSpec.of(good))
    with pytest.raises(MergeError, match="cannot step, mean delta: tensor"):
        optimizer.step(state, good, bad)
    with pytest.raises(MergeError, match="cannot step, tensors: tensor"):
        optimizer.step(state, bad, good)
