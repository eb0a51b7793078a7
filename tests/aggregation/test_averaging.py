# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from aggregation import Averaging, MergeError
from protocol import ParamSpec

ELEMENTS = st.floats(-1e6, 1e6, width=32)
ARRAYS = npst.arrays(np.float32, (2, 2), elements=ELEMENTS)
SPEC = ParamSpec.of({"a": np.zeros((2, 2), "f4")})


@given(ARRAYS, ARRAYS, st.floats(0.01, 10))
def test_step_adds_the_scaled_change_and_writes_to_nothing(values, change, rate):
    optimizer = Averaging(learning_rate=rate)
    before = values.tobytes(), change.tobytes()
    state = optimizer.init(SPEC)
    after, stepped = optimizer.step(state, {"a": values}, {"a": change})
    slow = [
        np.float32(x + rate * d)
        for x, d in zip(values.flatten().tolist(), change.flatten().tolist(), strict=True)
    ]
    assert stepped["a"].flatten().tolist() == slow
    assert SPEC.mismatch(stepped) is None
    assert after == state
    assert (values.tobytes(), change.tobytes()) == before


def test_the_default_is_plain_averaging():
    assert Averaging() == Averaging(learning_rate=1.0)


@pytest.mark.parametrize("rate", [0, -1.0, np.nan, np.inf, "1", None, True])
def test_a_rate_that_is_not_positive_and_finite_is_refused(rate):
    with pytest.raises(MergeError, match="server learning rate"):
        Averaging(learning_rate=rate)


def test_step_refuses_when_either_argument_does_not_fit():
    optimizer = Averaging()
    good, bad = {"a": np.zeros((2, 2), "f4")}, {"a": np.zeros(4, "f4")}
    with pytest.raises(MergeError, match="cannot step, tensors: tensor"):
        optimizer.step(optimizer.init(SPEC), bad, good)
    with pytest.raises(MergeError, match="cannot step, mean delta: tensor"):
        optimizer.step(optimizer.init(SPEC), good, bad)


def test_step_refuses_when_the_result_is_not_finite():
    huge = {"a": np.full((2, 2), 3e38, np.float32)}
    optimizer = Averaging()
    with pytest.raises(MergeError, match="lower the server learning rate"):
        optimizer.step(optimizer.init(SPEC), huge, huge)
