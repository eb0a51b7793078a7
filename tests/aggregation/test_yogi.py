# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.errors import MergeError
from aggregation.selection import server_optimizer_named
from aggregation.server_optimizers.yogi import FedYogi
from protocol import ParamSpec

DELTAS = st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=8)


def oracle(deltas, rate, beta_1, beta_2, tau, initial, correct) -> float:
    """One value, literally: Reddi et al. 2021, algorithm 2, FedYogi."""
    x, m, v = 0.5, 0.0, initial
    for t, delta in enumerate(deltas, start=1):
        m = beta_1 * m + (1 - beta_1) * delta
        square = delta * delta
        sign = (v > square) - (v < square)
        v = v - (1 - beta_2) * square * sign
        first, second = (m / (1 - beta_1**t), v / (1 - beta_2**t)) if correct else (m, v)
        x = float(np.float32(x + rate * first / (math.sqrt(second) + tau)))
    return x


def found(optimizer, deltas) -> float:
    tensors = {"a": np.array([0.5, -0.25], np.float32)}
    state = optimizer.init(ParamSpec.of(tensors))
    for delta in deltas:
        state, tensors = optimizer.step(state, tensors, {"a": np.array([delta, 0], np.float32)})
    assert tensors["a"][1] == np.float32(-0.25)
    return float(tensors["a"][0])


@given(DELTAS, st.floats(1e-4, 0.5), st.floats(0, 0.99), st.floats(0, 0.999), st.floats(0, 1))
def test_step_equals_the_literal_algorithm(deltas, rate, beta_1, beta_2, initial):
    optimizer = FedYogi(learning_rate=rate, beta_1=beta_1, beta_2=beta_2, initial=initial)
    expected = oracle(deltas, rate, beta_1, beta_2, 1e-3, initial, correct=False)
    assert found(optimizer, deltas) == pytest.approx(expected, abs=1e-6)


@given(DELTAS)
def test_corrected_step_equals_the_literal_algorithm(deltas):
    optimizer = FedYogi(initial=0.0, bias_correction=True)
    expected = oracle(deltas, 0.01, 0.9, 0.99, 1e-3, 0.0, correct=True)
    assert found(optimizer, deltas) == pytest.approx(expected, abs=1e-6)


def test_defaults_are_the_papers():
    assert FedYogi() == FedYogi(
        learning_rate=0.01, beta_1=0.9, beta_2=0.99, adaptivity=1e-3, initial=None
    )


def test_after_a_large_change_the_spread_falls_by_what_later_changes_are():
    optimizer = FedYogi()
    tensors = {"a": np.zeros(1, np.float32)}
    state = optimizer.init(ParamSpec.of(tensors))
    seen = []
    for delta in (1.0, 0.1, 0.1):
        state, tensors = optimizer.step(state, tensors, {"a": np.array([delta], np.float32)})
        seen.append(float(state.moments["second/a"][0]))
    # to 0.99 of itself and less it would fall with Adam
    assert seen[0] == pytest.approx(0.01 + 1e-6)
    assert seen[1] == pytest.approx(seen[0] - 0.01 * 0.01)


def test_the_start_of_v_is_an_error_with_bias_correction():
    with pytest.raises(MergeError, match="initial: expected 0 with bias correction"):
        FedYogi(initial=1e-6, bias_correction=True)


def test_arguments_and_state_are_not_changed():
    optimizer = FedYogi()
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
        {"beta_2": 1.0},
        {"initial": np.nan},
    ],
)
def test_a_setting_outside_its_range_is_refused(settings):
    with pytest.raises(MergeError, match="expected"):
        FedYogi(**settings)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e200])
def test_a_change_that_is_not_finite_or_whose_square_is_not_is_refused(value):
    tensors = {"a": np.ones(3)}
    optimizer = FedYogi()
    with pytest.raises(MergeError, match='tensor "a"'):
        optimizer.step(
            optimizer.init(ParamSpec.of(tensors)), tensors, {"a": np.array([1.0, value, 1.0])}
        )


def test_what_does_not_fit_is_refused():
    optimizer = FedYogi()
    good, bad = {"a": np.ones(3, np.float32)}, {"a": np.ones(4, np.float32)}
    state = optimizer.init(ParamSpec.of(good))
    with pytest.raises(MergeError, match="cannot step, mean delta: tensor"):
        optimizer.step(state, good, bad)
    with pytest.raises(MergeError, match="cannot step, tensors: tensor"):
        optimizer.step(state, bad, good)


def test_v_starts_at_tau_squared_unless_it_is_given_or_corrected():
    spec = ParamSpec.of({"a": np.zeros(2, "f4")})

    def first(**settings) -> float:
        return float(FedYogi(**settings).init(spec).moments["second/a"][0])

    assert first() == 1e-3**2
    assert first(adaptivity=0.1) == 0.1**2
    assert first(adaptivity=0.1, initial=0.5) == 0.5
    assert first(bias_correction=True) == 0.0
    made = server_optimizer_named("yogi:initial=0.25", adaptivity=0.1)
    assert made == FedYogi(learning_rate=0.01, adaptivity=0.1, initial=0.25)
