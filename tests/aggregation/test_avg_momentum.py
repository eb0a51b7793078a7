# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from aggregation.errors import MergeError
from aggregation.server_optimizers.averaging import Averaging
from aggregation.server_optimizers.avg_momentum import FedAvgM
from protocol import ParamSpec

ARRAYS = npst.arrays(np.float32, (2, 2), elements=st.floats(-1e3, 1e3, width=32))
SPEC = ParamSpec.of({"a": np.zeros((2, 2), "f4")})


@given(st.lists(ARRAYS, min_size=1, max_size=6), st.floats(0.01, 2), st.floats(0, 0.99))
def test_steps_are_those_of_the_slow_oracle_and_write_to_nothing(deltas, rate, momentum):
    optimizer = FedAvgM(learning_rate=rate, momentum=momentum)
    state, tensors = optimizer.init(SPEC), {"a": np.ones((2, 2), "f4")}
    values, sums = [1.0] * 4, [0.0] * 4
    for delta in deltas:
        image = delta.tobytes(), tensors["a"].tobytes(), state.moments["sum/a"].tobytes()
        after, stepped = optimizer.step(state, tensors, {"a": delta})
        assert image == (
            delta.tobytes(),
            tensors["a"].tobytes(),
            state.moments["sum/a"].tobytes(),
        )
        state, tensors = after, stepped
        sums = [momentum * s + d for s, d in zip(sums, delta.flatten().tolist(), strict=True)]
        values = [float(np.float32(x + rate * s)) for x, s in zip(values, sums, strict=True)]
        assert tensors["a"].flatten().tolist() == values
    assert SPEC.mismatch(tensors) is None


@given(ARRAYS, ARRAYS)
def test_without_momentum_it_is_plain_averaging(values, delta):
    plain, none = Averaging(learning_rate=0.3), FedAvgM(learning_rate=0.3, momentum=0)
    _, expected = plain.step(plain.init(SPEC), {"a": values}, {"a": delta})
    _, found = none.step(none.init(SPEC), {"a": values}, {"a": delta})
    np.testing.assert_array_equal(found["a"], expected["a"])


def test_a_change_that_stays_the_same_comes_to_ten_times_itself():
    optimizer = FedAvgM()
    tensors = {"a": np.zeros(1)}
    state = optimizer.init(ParamSpec.of(tensors))
    for _ in range(200):
        before = tensors["a"][0]
        state, tensors = optimizer.step(state, tensors, {"a": np.array([0.5])})
    assert tensors["a"][0] - before == pytest.approx(5)


@pytest.mark.parametrize("rate", [0, -1.0, np.nan, np.inf, "1", None, True])
def test_a_rate_that_is_not_positive_and_finite_is_refused(rate):
    with pytest.raises(MergeError, match="server learning rate"):
        FedAvgM(learning_rate=rate)


@pytest.mark.parametrize("momentum", [-0.1, 1, np.nan, "0", None, True])
def test_a_momentum_outside_its_range_is_refused(momentum):
    with pytest.raises(MergeError, match="momentum: expected from 0 to below 1"):
        FedAvgM(momentum=momentum)


def test_step_refuses_what_does_not_fit_or_is_not_finite():
    optimizer = FedAvgM()
    good, bad = {"a": np.zeros((2, 2), "f4")}, {"a": np.zeros(4, "f4")}
    with pytest.raises(MergeError, match="cannot step, tensors: tensor"):
        optimizer.step(optimizer.init(SPEC), bad, good)
    with pytest.raises(MergeError, match="cannot step, mean delta: tensor"):
        optimizer.step(optimizer.init(SPEC), good, bad)
    for value in (np.nan, np.inf, 3e38):
        huge = {"a": np.full((2, 2), value, np.float32)}
        with pytest.raises(MergeError, match="lower the server learning rate"):
            optimizer.step(optimizer.init(SPEC), {"a": np.full((2, 2), 3e38, "f4")}, huge)
