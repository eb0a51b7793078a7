# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import statistics
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from aggregation.errors import MergeError
from aggregation.robust.bulyan import Bulyan
from protocol import ParamSpec

# whole numbers: every distance and score is exact, equal ones are equal
ROWS = st.integers(3, 10).flatmap(
    lambda n: npst.arrays(np.float32, (n, 3), elements=st.integers(-9, 9).map(float))
)

# algorithms.md: seven updates of two values, of which the last is an attacker's
KNOWN = [(1, 1), (1.1, 0.9), (0.9, 1.2), (1, 1.05), (1.2, 1), (0.95, 0.9), (10, -10)]


def merged(merger, rows) -> np.ndarray:
    rows = np.asarray(rows, np.float32)
    state = merger.init(ParamSpec.of({"a": rows[0]}))
    for number, row in enumerate(rows):
        state = merger.add(state, {"a": row}, 1.0, client=f"c{number}")
    return merger.finish(state).delta["a"]


def attacked(honest: int, liars: int) -> np.ndarray:
    """Honest updates near 1, and others of a million, [n_clients, 20]."""
    near = np.random.default_rng(honest).normal(1, 0.1, (honest, 20))
    return np.vstack([near, np.full((liars, 20), 1e6)]).astype(np.float32)


def slow_scores(rows: list[list[float]], neighbours: int) -> list[float]:
    scores = []
    for i, row in enumerate(rows):
        distances = sorted(
            sum((a - b) ** 2 for a, b in zip(row, other, strict=True))
            for j, other in enumerate(rows)
            if j != i
        )
        scores.append(sum(distances[:neighbours]))
    return scores


def slow_bulyan(rows: list[list[float]], byzantine: int) -> list[float]:
    left = [list(map(Fraction, row)) for row in rows]
    chosen = []
    while len(chosen) < len(rows) - 2 * byzantine:
        scores = slow_scores(left, max(1, len(left) - byzantine - 2))
        chosen.append(left.pop(scores.index(min(scores))))
    kept = len(chosen) - 2 * byzantine
    result = []
    for column in zip(*chosen, strict=True):
        median = statistics.median(column)
        nearest = sorted(column, key=lambda value: (abs(value - median), value))[:kept]
        result.append(float(sum(nearest) / kept))
    return result


@given(ROWS, st.data())
def test_the_mean_is_that_of_the_slow_oracle(rows, data):
    byzantine = data.draw(st.integers(0, (len(rows) - 3) // 4))
    found = merged(Bulyan(byzantine=byzantine), rows)
    np.testing.assert_array_equal(found, np.array(slow_bulyan(rows.tolist(), byzantine), "f4"))


def test_two_liars_are_withstood_as_the_oracle_has_it():
    rows = np.random.default_rng(0).integers(-9, 10, (11, 3)).astype("f4")
    found = merged(Bulyan(byzantine=2), rows)
    np.testing.assert_array_equal(found, np.array(slow_bulyan(rows.tolist(), 2), "f4"))


def test_known_answer():
    found = merged(Bulyan(byzantine=1), KNOWN)
    np.testing.assert_allclose(found, (0.96667, 1.01667), atol=1e-5)


@pytest.mark.parametrize(("honest", "liars"), [(6, 1), (9, 2), (12, 3)])
def test_liars_up_to_f_leave_every_value_among_the_honest(honest, liars):
    rows = attacked(honest, liars)
    found = merged(Bulyan(byzantine=liars), rows)
    assert (rows[:honest].min(axis=0) <= found).all()
    assert (found <= rows[:honest].max(axis=0)).all()
    assert (rows.mean(axis=0) > 1e5).all()


def test_a_liar_that_hides_in_one_value_moves_it_no_further_than_honest_ones():
    # near in norm, so that Krum may take it, and far off in a single value
    rows = attacked(7, 0)
    rows = np.vstack([rows, rows.mean(axis=0)])
    rows[-1, 0] += 1.5
    found = merged(Bulyan(byzantine=1), rows)
    assert rows[:7, 0].min() <= found[0] <= rows[:7, 0].max()


@pytest.mark.parametrize(("byzantine", "count"), [(0, 2), (1, 6), (2, 10)])
def test_finish_refuses_when_f_is_too_many_for_the_updates(byzantine, count):
    needed = 4 * byzantine + 3
    message = f"bulyan: with byzantine f = {byzantine}, expected at least n = {needed} .*{count}"
    with pytest.raises(MergeError, match=message):
        merged(Bulyan(byzantine=byzantine), np.ones((count, 2)))
    merged(Bulyan(byzantine=byzantine), np.ones((needed, 2)))


@pytest.mark.parametrize("byzantine", [-1, 1.0, "1", None, True])
def test_f_that_is_no_count_is_refused(byzantine):
    with pytest.raises(MergeError, match="byzantine: expected an integer of 0 or above"):
        Bulyan(byzantine=byzantine)
