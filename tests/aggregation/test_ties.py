# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from aggregation.errors import MergeError
from aggregation.mergers.ties import TIES, largest_only
from protocol import ParamSpec

# whole numbers and weights of powers of two: sums are exact, and cancel to 0
ROWS = npst.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 8)),
    elements=st.integers(-5, 5).map(float),
)


def merged(merger, rows, weights=None) -> np.ndarray:
    state = merger.init(ParamSpec.of({"a": rows[0]}))
    for number, row in enumerate(rows):
        weight = 1.0 if weights is None else weights[number]
        state = merger.add(state, {"a": row}, weight, client=f"c{number}")
    return merger.finish(state).delta["a"]


def sign(value) -> int:
    return (value > 0) - (value < 0)


def slow(rows: list[list[float]], weights: list[int], percent: int) -> list[float]:
    """The source, value by value; λ = 1."""
    size = len(rows[0])
    count = max(1, size * percent // 100)
    trimmed = []
    for row in rows:
        stays = sorted(range(size), key=lambda i: (-abs(row[i]), i))[:count]
        trimmed.append(
            [Fraction(value) if i in stays else Fraction(0) for i, value in enumerate(row)]
        )
    columns = list(zip(*trimmed, strict=True))
    signs = [
        sign(sum(w * value for w, value in zip(weights, column, strict=True))) for column in columns
    ]
    majority = sign(sum(signs))
    result = []
    for column, elected in zip(columns, signs, strict=True):
        agreeing = [
            (w, value)
            for w, value in zip(weights, column, strict=True)
            if value != 0 and sign(value) == (elected or majority)
        ]
        total = sum(w for w, _ in agreeing)
        result.append(float(sum(w * v for w, v in agreeing) / total) if total else 0.0)
    return result


@given(ROWS, st.integers(1, 100), st.data())
def test_the_merge_is_that_of_the_slow_oracle(rows, percent, data):
    choices = st.lists(st.sampled_from([1, 2, 4, 8]), min_size=len(rows), max_size=len(rows))
    weights = data.draw(choices)
    found = merged(TIES(density=percent / 100), rows, weights)
    np.testing.assert_allclose(found, slow(rows.tolist(), weights, percent), rtol=1e-6)


@given(ROWS, st.floats(0.1, 1e6))
def test_equal_weights_change_no_bit(rows, weight):
    plain = merged(TIES(), rows)
    assert merged(TIES(), rows, [weight] * len(rows)).tobytes() == plain.tobytes()


def test_by_hand():
    rows = np.array(
        [[5, -4, 0.1, 3, 0], [4, 4, 0.2, -9, 0.1], [-8, 0.1, 0.3, 4, -7]], "f4"
    )  # three of five stay: 5 -4 3 | 4 4 -9 | -8 4 -7
    found = merged(TIES(density=0.6), rows)
    # sums 1, 0, 0, -2, -7: signs + . . - -, so that most have -
    np.testing.assert_allclose(found, [4.5, -4, 0, -9, -7])
    np.testing.assert_allclose(merged(TIES(density=0.6, scaling=0.5), rows), found / 2)


def test_a_density_that_floats_round_down_keeps_as_many_as_it_says():
    # 0.29 · 100 is 28.999999999999996
    found = merged(TIES(density=0.29), np.arange(1, 101.0, dtype="f4")[None])
    assert np.flatnonzero(found).tolist() == list(range(71, 100))


def test_where_no_sign_has_the_majority_what_cancels_is_0():
    rows = np.array([[1, 2, -3], [-1, 2, -3]], "f4")
    np.testing.assert_array_equal(merged(TIES(density=1), rows), [0, 2, -3])


def test_trimming_is_over_all_tensors_together():
    update = {"a": np.array([1, 2], "f4"), "b": np.array([[9, -8], [3, 7]], "f4")}
    merger = TIES(density=0.5)
    result = merger.finish(merger.add(merger.init(ParamSpec.of(update)), update, 1)).delta
    assert result["a"].tolist() == [0, 0]
    assert result["b"].tolist() == [[9, -8], [0, 7]]


@given(
    npst.arrays(np.float64, st.integers(1, 20), elements=st.integers(-4, 4).map(float)),
    st.integers(1, 25),
)
def test_exactly_so_many_stay_and_of_equal_ones_the_first(vector, count):
    before = vector.tobytes()
    found = largest_only(vector, count)
    stays = sorted(range(len(vector)), key=lambda i: (-abs(vector[i]), i))[:count]
    expected = [value if i in stays else 0 for i, value in enumerate(vector.tolist())]
    assert found.tolist() == expected
    found[:] = 9
    assert vector.tobytes() == before


@pytest.mark.parametrize("density", [0, 1.1, np.nan, "1", None, True])
def test_a_density_outside_its_range_is_refused(density):
    with pytest.raises(MergeError, match="density: expected above 0 and at most 1"):
        TIES(density=density)


@pytest.mark.parametrize("scaling", [0, np.inf, None])
def test_a_scaling_that_is_not_positive_and_finite_is_refused(scaling):
    with pytest.raises(MergeError, match="scaling: expected"):
        TIES(scaling=scaling)
