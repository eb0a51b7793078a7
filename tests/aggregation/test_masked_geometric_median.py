# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from aggregation.errors import MergeError
from aggregation.robust.geometric_median import GeometricMedian
from aggregation.robust.masked_geometric_median import Term, client_term, next_centre
from protocol import ParamSpec

ROWS = npst.arrays(
    np.float32,
    st.tuples(st.integers(1, 8), st.integers(1, 4)),
    elements=st.floats(-100, 100, width=32),
)
# algorithms.md: seven updates of two values, of which the last is an attacker's
KNOWN = [(1, 1), (1.1, 0.9), (0.9, 1.2), (1, 1.05), (1.2, 1), (0.95, 0.9), (10, -10)]


def summed(terms: list[Term]) -> Term:
    return Term(
        moved=np.sum([term.moved for term in terms], axis=0),
        weight=sum(term.weight for term in terms),
    )


def by_sums(rows, smoothing: float, steps: int) -> np.ndarray:
    """From the mean, so many steps."""
    rows = np.asarray(rows, np.float32)
    centre = rows.mean(axis=0, dtype=np.float64)
    for _ in range(steps):
        terms = [client_term(centre, row, smoothing=smoothing) for row in rows]
        centre = next_centre(centre, summed(terms), smoothing=smoothing)
    return centre


def merged(merger: GeometricMedian, rows) -> np.ndarray:
    rows = np.asarray(rows, np.float32)
    state = merger.init(ParamSpec.of({"a": rows[0]}))
    for number, row in enumerate(rows):
        state = merger.add(state, {"a": row}, 1.0, client=f"c{number}")
    return merger.finish(state).delta["a"]


@given(ROWS, st.sampled_from([1e-5, 1e-2, 1.0, 1e3]), st.integers(1, 6))
def test_sums_take_the_steps_of_the_geometric_median(rows, smoothing, steps):
    expected = merged(GeometricMedian(smoothing=smoothing, iterations=steps), rows)
    np.testing.assert_allclose(by_sums(rows, smoothing, steps), expected, rtol=1e-4, atol=2e-4)


def test_known_answer():
    np.testing.assert_allclose(by_sums(KNOWN, 1e-5, 3), (1.06734, 0.94963), atol=1e-5)


@given(ROWS, st.floats(1e-6, 1e6))
def test_terms_are_bounded_whatever_the_update_is(rows, smoothing):
    for row in rows:
        term = client_term(rows[0].astype(np.float64), row, smoothing=smoothing)
        assert np.linalg.norm(term.moved) <= 1 + 1e-12
        assert 0 < term.weight <= 1


def test_terms_of_huge_updates_are_bounded_too():
    term = client_term(np.zeros(3), np.array([1e300, -1e300, 0.0]), smoothing=1.0)
    np.testing.assert_allclose(term.moved, [0.5**0.5, -(0.5**0.5), 0.0])
    assert 0 < term.weight < 1e-299


def test_a_coarse_grid_is_enough_where_smoothing_is_as_large_as_honest_distances():
    rng = np.random.default_rng(0)
    honest = rng.normal(1, 0.1, (14, 20))
    rows = np.vstack([honest, np.full((6, 20), 1e4)])
    spread = np.linalg.norm(honest - honest.mean(axis=0), axis=1).max()
    far = np.linalg.norm(rows.mean(axis=0) - honest.mean(axis=0))
    # From the mean itself even honest weights are below a step: with such liars one starts where
    # the last round's centre is.
    centre = np.zeros(20)
    for _ in range(10):
        terms = [client_term(centre, row, smoothing=1.0) for row in rows]
        steps = [
            Term(moved=np.rint(t.moved * 128) / 128, weight=round(t.weight * 128) / 128)
            for t in terms
        ]
        centre = next_centre(centre, summed(steps), smoothing=1.0)
    assert np.linalg.norm(centre - honest.mean(axis=0)) < 2 * spread < far / 1000


def test_inputs_are_not_written_to():
    centre, update = np.arange(4.0), np.ones(4, np.float32)
    term = client_term(centre, update, smoothing=0.5)
    next_centre(centre, term, smoothing=0.5)
    assert centre.tolist() == [0, 1, 2, 3] and update.tolist() == [1] * 4


@pytest.mark.parametrize("smoothing", [0, -1, np.nan, np.inf, "1", True])
def test_smoothing_that_is_not_positive_and_finite_is_refused(smoothing):
    with pytest.raises(MergeError, match="smoothing: expected a finite number above 0"):
        client_term(np.zeros(2), np.zeros(2), smoothing=smoothing)
    with pytest.raises(MergeError, match="smoothing: expected a finite number above 0"):
        next_centre(np.zeros(2), Term(moved=np.zeros(2), weight=1.0), smoothing=smoothing)


@pytest.mark.parametrize("update", [[np.nan, 0], [np.inf, 0], [1.7e308, 1.7e308]])
def test_an_update_without_a_finite_distance_is_refused(update):
    with pytest.raises(MergeError, match="finite"):
        client_term(np.zeros(2), np.array(update), smoothing=1.0)


@pytest.mark.parametrize("weight", [0.0, -1.0, np.nan, np.inf])
def test_sums_of_nobody_are_refused(weight):
    with pytest.raises(MergeError, match="sum of weights above 0"):
        next_centre(np.zeros(2), Term(moved=np.zeros(2), weight=weight), smoothing=1.0)


def test_other_sizes_and_infinite_sums_are_refused():
    with pytest.raises(MergeError, match=r"expected an update like the centre, \[2\], found \[3\]"):
        client_term(np.zeros(2), np.zeros(3), smoothing=1.0)
    with pytest.raises(MergeError, match=r"expected sums like the centre, \[2\], found \[3\]"):
        next_centre(np.zeros(2), Term(moved=np.zeros(3), weight=1.0), smoothing=1.0)
    with pytest.raises(MergeError, match="expected finite sums"):
        next_centre(np.zeros(2), Term(moved=np.full(2, np.inf), weight=1.0), smoothing=1.0)
