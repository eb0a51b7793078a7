# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from aggregation.errors import MergeError
from aggregation.gathered import checked_row, gathered, nothing_gathered, require_some, with_row
from protocol import ParamSpec

SPEC = ParamSpec.of({"b": np.zeros(2, "f4"), "a": np.zeros((1, 2))})


def test_rows_weights_clients_and_memory_are_kept_in_the_order_of_add():
    memory = {"x": np.ones(1)}
    state = nothing_gathered(SPEC, memory)
    for number in range(3):
        update = {"a": np.full((1, 2), number + 0.5), "b": np.full(2, -number, "f4")}
        state = gathered(state, update, number + 1, f"c{number}")
    assert len(state) == 3
    assert [row.tolist() for row in state.rows] == [
        [number + 0.5, number + 0.5, -number, -number] for number in range(3)
    ]
    assert (state.weights, state.clients) == ((1.0, 2.0, 3.0), ("c0", "c1", "c2"))
    assert state.memory is memory


def test_an_earlier_state_stays_as_it_was():
    first = nothing_gathered(SPEC, {})
    one = with_row(first, np.ones(4), 1.0, "x")
    other = with_row(first, np.zeros(4), 2.0, "y")
    assert (len(first), len(one), len(other)) == (0, 1, 1)
    assert (one.rows.row(0).tolist(), other.rows.row(0).tolist()) == ([1] * 4, [0] * 4)


def test_a_row_is_the_callers_own():
    update = {"a": np.ones((1, 2)), "b": np.ones(2, "f4")}
    row = checked_row(SPEC, update)
    row[:] = 5
    assert update["a"].tolist() == [[1, 1]] and row.dtype == np.float64


def test_a_row_beyond_float32_is_refused_by_name():
    largest = float(np.finfo(np.float32).max)
    update = {"a": np.array([[0.0, -largest]]), "b": np.ones(2, "f4")}
    checked_row(SPEC, update)
    update["a"][0, 1] *= 1.001
    with pytest.raises(
        MergeError, match='tensor "a": expected values within float32, found one of'
    ):
        checked_row(SPEC, update)


def test_nothing_is_refused_in_the_name_of_the_rule():
    with pytest.raises(MergeError, match=r"median: .*nothing was added"):
        require_some("median", 0)
    require_some("median", 1)
