# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from aggregation.errors import MergeError
from aggregation.mergers.task_arithmetic import TaskArithmetic
from protocol import ParamSpec

ROWS = npst.arrays(
    np.float32,
    st.tuples(st.integers(1, 6), st.integers(1, 5)),
    elements=st.floats(-1e3, 1e3, width=32),
)


def merged(merger, rows, weights=None) -> np.ndarray:
    state = merger.init(ParamSpec.of({"a": rows[0]}))
    for number, row in enumerate(rows):
        weight = 1.0 if weights is None else weights[number]
        state = merger.add(state, {"a": row}, weight, client=f"c{number}")
    return merger.finish(state).delta["a"]


@given(ROWS, st.floats(0.01, 10))
def test_equal_weights_give_the_scaled_sum(rows, scaling):
    found = merged(TaskArithmetic(scaling=scaling), rows, [7.0] * len(rows))
    expected = [scaling * math.fsum(column) for column in rows.T.tolist()]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9 * scaling)


@given(ROWS, st.data())
def test_weights_shift_the_sum_towards_those_that_weigh_more(rows, data):
    weights = data.draw(st.lists(st.integers(1, 1000), min_size=len(rows), max_size=len(rows)))
    expected = [
        0.4
        * len(rows)
        * math.fsum(w * value for w, value in zip(weights, column, strict=True))
        / sum(weights)
        for column in rows.T.tolist()
    ]
    np.testing.assert_allclose(
        merged(TaskArithmetic(), rows, weights), expected, rtol=1e-6, atol=1e-6
    )


def test_a_share_of_one_over_n_is_the_mean():
    rows = np.random.default_rng(0).normal(size=(5, 4)).astype("f4")
    np.testing.assert_allclose(
        merged(TaskArithmetic(scaling=1 / 5), rows), rows.mean(axis=0), rtol=1e-5
    )


def test_finish_refuses_a_sum_beyond_the_tensors_type():
    with pytest.raises(MergeError, match='tensor "a": expected a finite merged change'):
        merged(TaskArithmetic(scaling=1), np.full((2, 1), 3e38, "f4"))


@pytest.mark.parametrize("scaling", [0, -1, np.nan, np.inf, "1", None, True])
def test_a_scaling_that_is_not_positive_and_finite_is_refused(scaling):
    with pytest.raises(MergeError, match="scaling: expected a finite number above 0"):
        TaskArithmetic(scaling=scaling)
