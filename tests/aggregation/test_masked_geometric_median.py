# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from aggregation.errors import MergeError
from aggregation.robust.geometric_median import GeometricMedian
from aggregation.robust.masked_geometric_median import (
    MaskedGeometricMedian,
    Term,
    client_term,
    next_centre,
)
from aggregation.vectors import flat, shaped
from protocol import ParamSpec
from protocol.controls import joined

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


@given(
    st.integers(1, 6),
    st.integers(1, 5),
    st.floats(1e-2, 10),
    st.lists(st.floats(0, 1), min_size=5, max_size=5),
    st.integers(0, 2**32 - 1),
)
def test_a_lie_about_terms_is_worth_no_more_than_their_bounds(
    honest, liars, smoothing, weights, seed
):
    """f of them move the centre by f·(ν + the honest step) over the honest weights at most."""
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=4)
    terms = [
        client_term(centre, rng.normal(size=4) * 3, smoothing=smoothing) for _ in range(honest)
    ]
    before = summed(terms)
    for weight in weights[:liars]:
        moved = rng.normal(size=4)
        terms.append(Term(moved=moved / np.linalg.norm(moved), weight=weight))
    without, found = (
        next_centre(centre, total, smoothing=smoothing) for total in (before, summed(terms))
    )
    step = np.linalg.norm(without - centre)
    bound = liars * (smoothing + step) / before.weight
    assert np.linalg.norm(found - without) <= bound * (1 + 1e-9)


def test_a_step_that_was_summed_under_a_mask_ends_where_that_of_single_updates_does():
    rng = np.random.default_rng(1)
    spec = ParamSpec.of({"a": np.zeros((2, 3), "f4"), "b": np.zeros(4, "f4")})
    merger = MaskedGeometricMedian(smoothing=0.7)
    memory: dict[str, np.ndarray] = {}
    for _ in range(3):
        rows = [rng.normal(0.3, 1, 10).astype("f4") for _ in range(6)]
        one_by_one = merger.init(spec, memory=memory)
        centre = one_by_one.centre
        terms = [client_term(centre, row, smoothing=0.7) for row in rows]
        for row in rows:
            one_by_one = merger.add(one_by_one, shaped(spec, row), 1.0)
        total = summed(terms)
        step = shaped(spec, 0.7 * total.moved / total.weight)
        at_once = merger.finish(merger.add_step(merger.init(spec, memory=memory), step))
        found = merger.finish(one_by_one)
        np.testing.assert_allclose(
            flat(spec, at_once.delta), flat(spec, found.delta), rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(
            flat(spec, found.delta), next_centre(centre, total, smoothing=0.7), atol=1e-6
        )
        memory = dict(found.memory)
        np.testing.assert_array_equal(
            flat(spec, merger.centre(spec, memory)), flat(spec, found.delta)
        )


def test_the_centre_that_clients_were_sent_is_the_one_that_counts():
    spec = ParamSpec.of({"a": np.zeros(2, "f4")})
    merger = MaskedGeometricMedian()
    kept = {"centre/a": np.array([0.1, 0.2])}
    sent = {"a": np.array([0.5, 0.25], "f4")}
    state = merger.init(spec, current=joined({"a": np.ones(2, "f4")}, sent), memory=kept)
    np.testing.assert_array_equal(state.centre, [0.5, 0.25])
    np.testing.assert_array_equal(merger.init(spec, memory=kept).centre, np.float32([0.1, 0.2]))
    with pytest.raises(MergeError, match="expected finite values of shape"):
        merger.init(spec, memory={"centre/a": np.zeros(3)})


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
