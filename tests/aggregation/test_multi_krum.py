# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from aggregation.errors import MergeError
from aggregation.robust.krum import Krum
from aggregation.robust.multi_krum import MultiKrum
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
def test_the_mean_is_that_of_the_slow_oracle(rows, data):
    byzantine = data.draw(st.integers(0, (len(rows) - 3) // 2))
    chosen = data.draw(st.integers(0, len(rows) - byzantine))
    found = merged(MultiKrum(byzantine=byzantine, chosen=chosen), rows)
    scores = slow_scores(rows.tolist(), len(rows) - byzantine - 2)
    best = sorted(range(len(rows)), key=lambda number: scores[number])
    best = best[: chosen or len(rows) - byzantine]
    expected = [sum(rows[i, column].item() for i in best) / len(best) for column in range(3)]
    np.testing.assert_array_equal(found, np.array(expected, np.float32))


@given(ROWS)
def test_one_chosen_is_krum(rows):
    byzantine = (len(rows) - 3) // 2
    assert (
        merged(MultiKrum(byzantine=byzantine, chosen=1), rows).tobytes()
        == merged(Krum(byzantine=byzantine), rows).tobytes()
    )


@pytest.mark.parametrize("chosen", [0, 6])
def test_known_answer(chosen):
    found = merged(MultiKrum(byzantine=1, chosen=chosen), KNOWN)
    np.testing.assert_allclose(found, (1.025, 1.00833), atol=1e-5)


@pytest.mark.parametrize(("honest", "liars"), [(4, 1), (7, 3), (9, 2)])
def test_liars_up_to_f_are_never_in_the_mean(honest, liars):
    rows = attacked(honest, liars)
    found = merged(MultiKrum(byzantine=liars), rows)
    np.testing.assert_allclose(found, rows[:honest].mean(axis=0), rtol=1e-5)
    assert (rows.mean(axis=0) > 1e5).all()


def test_finish_refuses_when_f_or_m_is_too_many_for_the_updates():
    with pytest.raises(MergeError, match=r"multi-krum: .* f = 2, .* n = 7 .* n = 6"):
        merged(MultiKrum(byzantine=2), np.ones((6, 2)))
    with pytest.raises(MergeError, match=r"n = 7 .* f = 2, expected at most m = n - f = 5 .* 6"):
        merged(MultiKrum(byzantine=2, chosen=6), np.ones((7, 2)))


@pytest.mark.parametrize("setting", ["byzantine", "chosen"])
@pytest.mark.parametrize("value", [-1, 1.0, "1", None, True])
def test_a_setting_that_is_no_count_is_refused(setting, value):
    with pytest.raises(MergeError, match=f"{setting}: expected an integer of 0 or above"):
        MultiKrum(**{setting: value})
