# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from aggregation.errors import MergeError
from aggregation.robust.geometric_median import GeometricMedian
from protocol import ParamSpec

ROWS = npst.arrays(
    np.float32,
    st.tuples(st.integers(1, 8), st.integers(1, 4)),
    elements=st.floats(-100, 100, width=32),
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


def slow(rows: list[list[float]], smoothing: float, iterations: int) -> list[float]:
    """All the steps, whether they still move or not."""
    columns = range(len(rows[0]))
    centre = [sum(row[i] for row in rows) / len(rows) for i in columns]
    for _ in range(iterations):
        weights = [1 / max(smoothing, math.dist(centre, row)) for row in rows]
        centre = [
            sum(w * row[i] for w, row in zip(weights, rows, strict=True)) / sum(weights)
            for i in columns
        ]
    return centre


@given(ROWS, st.sampled_from([1e-5, 1e-2, 1.0, 1e3]), st.integers(1, 6))
def test_the_steps_are_those_of_the_slow_oracle(rows, smoothing, iterations):
    found = merged(GeometricMedian(smoothing=smoothing, iterations=iterations), rows)
    expected = slow(rows.tolist(), smoothing, iterations)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-4)


@given(ROWS)
def test_it_lies_among_the_updates_in_every_value(rows):
    found = merged(GeometricMedian(), rows)
    slack = 1e-5 * (1 + np.abs(rows).max())
    assert (rows.min(axis=0) - slack <= found).all()
    assert (found <= rows.max(axis=0) + slack).all()


def test_known_answer():
    found = merged(GeometricMedian(smoothing=1e-5, iterations=3), KNOWN)
    np.testing.assert_allclose(found, (1.06734, 0.94963), atol=1e-5)


def test_no_other_point_has_a_smaller_sum_of_distances():
    rows = np.random.default_rng(0).normal(size=(9, 3)).astype("f4")
    found = merged(GeometricMedian(), rows).astype("f8")

    def total(point):
        return sum(math.dist(point, row) for row in rows.tolist())

    for shift in np.vstack([np.eye(3), -np.eye(3)]) * 0.01:
        assert total(found) < total(found + shift)


def test_steps_end_when_they_stop_moving(monkeypatch):
    steps = []
    step = GeometricMedian._step

    def counted(self, state, centre):
        steps.append(1)
        return step(self, state, centre)

    monkeypatch.setattr(GeometricMedian, "_step", counted)
    merged(GeometricMedian(), [[1, 2], [1, 2], [1, 2]])
    assert len(steps) == 1
    merged(GeometricMedian(iterations=1000), KNOWN)
    assert 4 < len(steps) < 200


@pytest.mark.parametrize(("honest", "liars"), [(3, 1), (6, 4), (8, 2)])
def test_liars_below_a_half_leave_it_near_the_honest(honest, liars):
    rows = attacked(honest, liars)
    mean = rows[:honest].mean(axis=0)
    spread = np.linalg.norm(rows[:honest] - mean, axis=1).max()
    assert np.linalg.norm(merged(GeometricMedian(), rows) - mean) <= spread
    assert (rows.mean(axis=0) > 1e5).all()
    # the source's four steps are too few for liars this far off
    assert np.linalg.norm(merged(GeometricMedian(iterations=4), rows) - mean) > 1e3


@pytest.mark.parametrize("smoothing", [0, -1, np.nan, np.inf, "1", None, True])
def test_smoothing_that_is_not_positive_and_finite_is_refused(smoothing):
    with pytest.raises(MergeError, match="smoothing: expected a finite number above 0"):
        GeometricMedian(smoothing=smoothing)


@pytest.mark.parametrize("iterations", [0, -1, 3.0, "3", None, True])
def test_iterations_that_are_no_count_are_refused(iterations):
    with pytest.raises(MergeError, match="iterations: expected an integer of 1 or above"):
        GeometricMedian(iterations=iterations)
