# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from aggregation.errors import MergeError
from aggregation.mergers.greedy_soup import GreedySoup, greedy_soup
from protocol import ParamSpec

ROWS = npst.arrays(
    np.float32,
    st.tuples(st.integers(1, 6), st.just(3)),
    elements=st.integers(-32, 32).map(lambda eighths: eighths / 8),
)
TARGET = np.array([1.0, -0.5, 0.25])


def near(delta) -> float:
    """An accuracy of few values: how many of 30 steps the change is away from the target.

    In 4096ths, which no mean of up to six eighths is half way between: what rounding makes of a
    change must not decide.
    """
    steps = np.round(delta["a"].astype("f8") * 4096) / 4096
    return 1 - min(30, int(np.abs(steps - TARGET).sum() * 4)) / 30


def slow(rows: np.ndarray, evaluate) -> np.ndarray:
    """The source's recipe: sort by accuracy, add what strictly improves."""
    order = sorted(range(len(rows)), key=lambda i: (-evaluate({"a": rows[i]}), i))
    soup, best = [order[0]], evaluate({"a": rows[order[0]]})
    for i in order[1:]:
        trial = rows[[*soup, i]].astype("f8").sum(axis=0) / (len(soup) + 1)
        accuracy = evaluate({"a": trial.astype("f4")})
        if accuracy > best:
            soup, best = [*soup, i], accuracy
    return (rows[soup].astype("f8").sum(axis=0) / len(soup)).astype("f4")


def merged(rows, evaluate=near) -> np.ndarray:
    merger = GreedySoup(evaluate=evaluate)
    state = merger.init(ParamSpec.of({"a": rows[0]}))
    for row in rows:
        state = merger.add(state, {"a": row}, 1.0)
    return merger.finish(state).delta["a"]


@given(ROWS)
def test_function_and_merger_are_the_slow_oracle(rows):
    expected = slow(rows, near)
    np.testing.assert_array_equal(merged(rows), expected)
    np.testing.assert_array_equal(greedy_soup([{"a": row} for row in rows], near)["a"], expected)


@given(ROWS)
def test_it_is_no_less_accurate_than_any_candidate(rows):
    assert near({"a": merged(rows)}) >= max(near({"a": row}) for row in rows)


def test_what_does_not_strictly_improve_stays_out():
    rows = np.array([[1, 0, 0], [0, 1, 0]], "f4")
    np.testing.assert_array_equal(merged(rows, lambda _: 0.5), rows[0])
    # the second alone is better, and so comes first
    better = merged(rows, lambda delta: float(delta["a"][1] > 0.9))
    np.testing.assert_array_equal(better, rows[1])


def test_candidates_are_evaluated_once_alone_and_once_in_the_soup():
    seen = []

    def evaluate(delta):
        seen.append(delta["a"].copy())
        assert delta["a"].dtype == np.float32
        delta["a"][...] = 9  # what is evaluated belongs to the evaluator
        return -float(len(seen))

    rows = np.arange(12, dtype="f4").reshape(4, 3)
    np.testing.assert_array_equal(merged(rows, evaluate), rows[0])
    assert len(seen) == 7
    np.testing.assert_array_equal(seen[:4], rows)


@pytest.mark.parametrize("accuracy", [np.nan, np.inf, None, "0.5", 1j])
def test_an_accuracy_that_is_no_finite_number_is_refused(accuracy):
    with pytest.raises(MergeError, match="evaluate: expected a finite number, it gave"):
        merged(np.ones((2, 3), "f4"), lambda _: accuracy)


@pytest.mark.parametrize("accuracy", [np.float32(0.5), 1, 0.25])
def test_any_real_number_is_an_accuracy(accuracy):
    np.testing.assert_array_equal(merged(np.ones((2, 3), "f4"), lambda _: accuracy), [1, 1, 1])


def test_candidates_that_cannot_be_merged_are_refused():
    with pytest.raises(MergeError, match=r"greedy-soup: .*nothing was added"):
        greedy_soup([], near)
    with pytest.raises(MergeError, match="cannot merge: tensor"):
        greedy_soup([{"a": np.zeros(3, "f4")}, {"a": np.zeros(2, "f4")}], near)
    with pytest.raises(MergeError, match='tensor "a": expected finite values'):
        greedy_soup([{"a": np.full(3, np.nan, "f4")}], near)
    with pytest.raises(MergeError, match='"a" is int64'):
        greedy_soup([{"a": np.zeros(3, "i8")}], near)
    with pytest.raises(MergeError, match="cannot merge: tensor 'a': expected a numpy array"):
        greedy_soup([{"a": 1.0}], near)


def test_an_evaluator_that_cannot_be_called_is_refused():
    with pytest.raises(MergeError, match="evaluate: expected a callable"):
        GreedySoup(evaluate=0.5)


@given(ROWS)
def test_with_current_tensors_it_chooses_by_what_they_become(rows):
    current = {"a": np.array([0.5, 0.5, -0.25], np.float32)}

    def near_it(tensors) -> float:
        return near({"a": tensors["a"] - current["a"]})

    merger = GreedySoup(evaluate=near_it)
    state = merger.init(ParamSpec.of(current), current=current)
    for row in rows:
        state = merger.add(state, {"a": row}, 1.0)
    np.testing.assert_array_equal(merger.finish(state).delta["a"], merged(rows))
    with pytest.raises(MergeError, match="current tensors"):
        merger.init(ParamSpec.of(current), current={"a": np.zeros(2, "f4")})
