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


@given(
    deltas=st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=6),
    initial=st.floats(0, 1),
)
def test_without_correction_it_is_the_papers_algorithm(deltas: list[float], initial: float) -> None:
    optimizer = FedAdam(initial=initial, bias_correction=False)
    tensors = {"a": np.array([0.5], np.float32)}
    state = optimizer.init(ParamSpec.of(tensors))
    x, m, v = 0.5, 0.0, initial
    for delta in deltas:
        state, tensors = optimizer.step(state, tensors, {"a": np.array([delta], np.float32)})
        m = 0.9 * m + 0.1 * delta
        v = 0.99 * v + 0.01 * delta * delta
        x = float(np.float32(x + 0.01 * m / (math.sqrt(v) + 1e-3)))
    assert tensors["a"][0] == pytest.approx(x, abs=1e-6)


def test_defaults_give_the_bits_that_they_always_gave() -> None:
    rng = np.random.default_rng(4)
    tensors = {"a": rng.standard_normal((3, 4)).astype(np.float32), "s": np.array(1, np.float32)}
    optimizer = FedAdam(learning_rate=0.03)
    state = optimizer.init(ParamSpec.of(tensors))
    first = {name: np.zeros(value.shape) for name, value in tensors.items()}
    second = {name: np.zeros(value.shape) for name, value in tensors.items()}
    expected = dict(tensors)
    for steps in range(1, 9):
        deltas = {n: rng.standard_normal(v.shape).astype("f4") for n, v in sorted(tensors.items())}
        state, tensors = optimizer.step(state, tensors, deltas)
        for name, value in deltas.items():
            delta = value.astype(np.float64)
            first[name] = 0.9 * first[name] + (1 - 0.9) * delta
            second[name] = 0.99 * second[name] + (1 - 0.99) * delta**2
            mean = first[name] / (1 - 0.9 ** np.float64(steps))
            spread = np.sqrt(second[name] / (1 - 0.99 ** np.float64(steps)))
            change = 0.03 * mean / (spread + 1e-3)
            expected[name] = np.asarray(expected[name] + change, np.float32)
            assert tensors[name].tobytes() == expected[name].tobytes()
            assert state.moments[f"first/{name}"].tobytes() == first[name].tobytes()
            assert state.moments[f"second/{name}"].tobytes() == second[name].tobytes()
    assert state.moments["steps"] == 8
    assert all(isinstance(value, np.ndarray) for value in state.moments.values())


def test_the_start_of_v_is_an_error_with_bias_correction() -> None:
    with pytest.raises(MergeError, match="initial: expected 0 with bias correction"):
        FedAdam(initial=1e-6)
    assert FedAdam(initial=0.0) == FedAdam()


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e200])
def test_change_that_is_not_finite_or_whose_square_is_not_is_refused(value: float) -> None:
    optimizer = FedAdam()
    tensors = {"a": np.ones(3)}
    state = optimizer.init(ParamSpec.of(tensors))
    with pytest.raises(MergeError, match='tensor "a"'):
        optimizer.step(state, tensors, {"a": np.array([1.0, value, 1.0])})


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": 0.0},
        {"adaptivity": 0.0},
        {"beta_1": 1.0},
        {"beta_2": -0.1},
        {"beta_2": np.nan},
        {"initial": -1e-6},
        {"initial": np.inf},
    ],
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
