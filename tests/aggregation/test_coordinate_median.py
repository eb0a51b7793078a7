# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import statistics
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from aggregation.robust.coordinate_median import CoordinateMedian, sorted_median
from protocol import ParamSpec

SMALLEST = Fraction(1, 2**149)  # of float32 above 0
ROWS = npst.arrays(
    np.float32,
    st.tuples(st.integers(1, 9), st.integers(1, 5)),
    elements=st.floats(-1e6, 1e6, width=32),
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


@given(ROWS)
def test_each_value_is_the_exact_median(rows):
    found = merged(CoordinateMedian(), rows)
    assert found.dtype == np.float32
    for value, column in zip(found, rows.T, strict=True):
        exact = statistics.median(Fraction(float(entry)) for entry in column)
        assert abs(Fraction(float(value)) - exact) <= abs(exact) / 2**23 + SMALLEST


@given(ROWS, st.data())
def test_any_order_gives_the_same_bits(rows, data):
    order = data.draw(st.permutations(range(len(rows))))
    assert (
        merged(CoordinateMedian(), rows).tobytes()
        == merged(CoordinateMedian(), rows[order]).tobytes()
    )


def test_both_zeros_give_the_same_bits_in_any_order():
    for rows in ([[0.0], [-0.0]], [[-0.0], [0.0]], [[-0.0], [0.0], [-0.0]], [[-0.0]]):
        assert merged(CoordinateMedian(), rows).tobytes() == bytes(4)


def test_known_answer():
    np.testing.assert_allclose(merged(CoordinateMedian(), KNOWN), (1, 1), atol=1e-5)


@pytest.mark.parametrize(("honest", "liars"), [(2, 1), (5, 4), (8, 2)])
def test_liars_below_a_half_leave_every_value_among_the_honest(honest, liars):
    rows = attacked(honest, liars)
    found = merged(CoordinateMedian(), rows)
    assert (rows[:honest].min(axis=0) <= found).all()
    assert (found <= rows[:honest].max(axis=0)).all()
    assert (rows.mean(axis=0) > 1e5).all()


def test_the_median_of_sorted_columns_does_not_overflow():
    largest = np.finfo(np.float32).max
    assert sorted_median(np.array([[largest], [largest]], np.float32))[0] == float(largest)
