# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from aggregation.errors import MergeError
from aggregation.robust.distances import squared_distances
from aggregation.robust.krum import Krum, krum_scores
from aggregation.stack import Stack
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


@given(ROWS, st.data())
def test_the_update_is_that_of_the_slow_oracle(rows, data):
    byzantine = data.draw(st.integers(0, (len(rows) - 3) // 2))
    found = merged(Krum(byzantine=byzantine), rows)
    scores = slow_scores(rows.tolist(), len(rows) - byzantine - 2)
    assert found.tobytes() == rows[scores.index(min(scores))].tobytes()


def test_known_answer():
    assert merged(Krum(byzantine=1), KNOWN).tolist() == [1, 1]
    rows = Stack(2)
    for row in KNOWN:
        rows = rows.with_row(np.array(row))
    scores = krum_scores(squared_distances(rows), 4)
    assert np.argmin(scores) == 0
    assert scores[0] == pytest.approx(0.075, abs=1e-5)


def test_of_equal_scores_the_first_added_is_taken():
    assert merged(Krum(byzantine=0), [[0], [1], [3]]).tolist() == [0]
    assert merged(Krum(byzantine=0), [[1], [0], [3]]).tolist() == [1]


@pytest.mark.parametrize(("honest", "liars"), [(4, 1), (7, 3), (9, 2)])
def test_liars_up_to_f_are_never_taken(honest, liars):
    rows = attacked(honest, liars)
    found = merged(Krum(byzantine=liars), rows)
    assert any(found.tobytes() == row.tobytes() for row in rows[:honest])
    assert (rows.mean(axis=0) > 1e5).all()


@pytest.mark.parametrize(("byzantine", "count"), [(0, 2), (1, 4), (3, 8)])
def test_finish_refuses_when_f_is_too_many_for_the_updates(byzantine, count):
    needed = 2 * byzantine + 3
    message = f"krum: with byzantine f = {byzantine}, expected at least n = {needed} .*n = {count}"
    with pytest.raises(MergeError, match=message):
        merged(Krum(byzantine=byzantine), np.ones((count, 2)))
    merged(Krum(byzantine=byzantine), np.ones((needed, 2)))


@pytest.mark.parametrize("byzantine", [-1, 1.0, "1", None, True])
def test_f_that_is_no_count_is_refused(byzantine):
    with pytest.raises(MergeError, match="byzantine: expected an integer of 0 or above"):
        Krum(byzantine=byzantine)
