# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from aggregation.errors import MergeError
from aggregation.robust.centred_clipping import CentredClipping
from protocol import ParamSpec

ROWS = npst.arrays(
    np.float32,
    st.tuples(st.integers(1, 7), st.just(3)),
    elements=st.floats(-100, 100, width=32),
)


def attacked(honest: int, liars: int) -> np.ndarray:
    """Honest updates near 1, and others of a million, [n_clients, 20]."""
    near = np.random.default_rng(honest).normal(1, 0.1, (honest, 20))
    return np.vstack([near, np.full((liars, 20), 1e6)]).astype(np.float32)


def merged(merger, rows, memory=None):
    rows = np.asarray(rows, np.float32)
    state = merger.init(ParamSpec.of({"a": rows[0]}), memory=memory or {})
    for row in rows:
        state = merger.add(state, {"a": row}, 1.0)
    return merger.finish(state)


def slow(rows, radius: float, iterations: int, start: list[float]) -> list[float]:
    centre = start
    for _ in range(iterations):
        distances = [math.dist(row, centre) for row in rows]
        ordered = sorted(distances)
        middle = (ordered[(len(rows) - 1) // 2] + ordered[len(rows) // 2]) / 2
        limit = radius or middle
        moves = [0.0] * len(centre)
        for row, distance in zip(rows, distances, strict=True):
            factor = min(1, limit / distance) if distance > 0 else 1
            for i, value in enumerate(row):
                moves[i] += factor * (value - centre[i])
        centre = [value + move / len(rows) for value, move in zip(centre, moves, strict=True)]
    return centre


@given(
    ROWS,
    st.sampled_from([0, 0.5, 20.0, 1e6]),
    st.integers(1, 4),
    st.lists(st.floats(-10, 10), min_size=3, max_size=3),
)
def test_the_steps_are_those_of_the_slow_oracle(rows, radius, iterations, start):
    merger = CentredClipping(radius=radius, iterations=iterations)
    result = merged(merger, rows, {"centre/a": np.array(start)})
    expected = slow(rows.tolist(), radius, iterations, start)
    np.testing.assert_allclose(result.delta["a"], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(result.memory["centre/a"], expected, rtol=1e-6, atol=1e-6)


def test_the_first_round_starts_at_0_and_the_next_where_the_last_ended():
    merger = CentredClipping(radius=1, iterations=1)
    rows = np.full((5, 1), 10.0)
    memory = {}
    for number in range(1, 4):
        result = merged(merger, rows, memory)
        assert result.delta["a"].tolist() == [number]
        memory = dict(result.memory)
    assert memory["centre/a"].dtype == np.float64


def test_a_wide_radius_is_the_plain_mean():
    rows = np.random.default_rng(0).normal(size=(6, 4)).astype("f4")
    found = merged(CentredClipping(radius=1e9, iterations=1), rows).delta["a"]
    np.testing.assert_allclose(found, rows.mean(axis=0), rtol=1e-5)


def test_no_client_moves_it_further_than_the_radius_over_n():
    rows = attacked(9, 1)
    honest = merged(CentredClipping(radius=0.5, iterations=1), [*rows[:9], np.zeros(20)])
    lied = merged(CentredClipping(radius=0.5, iterations=1), rows)
    assert np.linalg.norm(lied.delta["a"] - honest.delta["a"]) <= 0.5 / 10 + 1e-6


@pytest.mark.parametrize(("honest", "liars"), [(3, 1), (7, 3), (8, 2)])
def test_liars_below_a_half_leave_it_near_the_honest(honest, liars):
    rows = attacked(honest, liars)
    mean = rows[:honest].mean(axis=0)
    spread = np.linalg.norm(rows[:honest] - mean, axis=1).max()
    memory = {}
    for _ in range(5):
        result = merged(CentredClipping(), rows, memory)
        memory = dict(result.memory)
        assert np.linalg.norm(result.delta["a"] - mean) <= 1.5 * spread
    assert (rows.mean(axis=0) > 1e5).all()


def test_updates_equal_to_the_centre_leave_it_where_it_is():
    result = merged(CentredClipping(), np.zeros((3, 2)))
    assert result.delta["a"].tolist() == [0, 0]
    # the median distance is 0: what few send does not pass
    result = merged(CentredClipping(), [[0, 0], [0, 0], [5, 5]])
    assert result.delta["a"].tolist() == [0, 0]


@pytest.mark.parametrize(
    "kept",
    [{"centre/b": np.zeros(3)}, {"centre/a": np.zeros(4)}, {"centre/a": np.full(3, np.nan)}],
)
def test_init_refuses_a_memory_of_other_tensors(kept):
    with pytest.raises(MergeError, match="centre/a"):
        CentredClipping().init(ParamSpec.of({"a": np.zeros(3, "f4")}), memory=kept)


def test_what_others_left_in_the_memory_is_passed_over():
    rows = np.ones((3, 2))
    other = {"rounds": np.array(3.0)}
    assert merged(CentredClipping(), rows, other).delta["a"].tobytes() == (
        merged(CentredClipping(), rows).delta["a"].tobytes()
    )


@pytest.mark.parametrize("radius", [-1, np.nan, np.inf, "1", None, True])
def test_a_radius_that_is_not_a_finite_number_of_0_or_above_is_refused(radius):
    with pytest.raises(MergeError, match="radius: expected"):
        CentredClipping(radius=radius)


@pytest.mark.parametrize("iterations", [0, -1, 3.0, "3", None, True])
def test_iterations_that_are_no_count_are_refused(iterations):
    with pytest.raises(MergeError, match="iterations: expected an integer of 1 or above"):
        CentredClipping(iterations=iterations)
