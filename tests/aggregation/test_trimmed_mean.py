# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from aggregation.errors import MergeError
from aggregation.robust.trimmed_mean import TrimmedMean
from protocol import ParamSpec

SMALLEST = Fraction(1, 2**149)  # of float32 above 0
ROWS = npst.arrays(
    np.float32,
    st.tuples(st.integers(1, 12), st.integers(1, 4)),
    elements=st.floats(-1e6, 1e6, width=32),
)
SHARES = st.integers(0, 49).map(lambda percent: percent / 100)

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


@given(ROWS, SHARES)
def test_each_value_is_the_exact_trimmed_mean(rows, share):
    found = merged(TrimmedMean(share=share), rows)
    cut = round(share * 100) * len(rows) // 100
    for value, column in zip(found, rows.T, strict=True):
        ordered = sorted(Fraction(float(entry)) for entry in column)
        kept = ordered[cut : len(ordered) - cut]
        exact = sum(kept, Fraction(0)) / len(kept)
        tolerance = abs(exact) / 2**23 + max(map(abs, kept)) / 2**45 + SMALLEST
        assert abs(Fraction(float(value)) - exact) <= tolerance


@given(ROWS, SHARES, st.data())
def test_any_order_gives_the_same_bits(rows, share, data):
    merger = TrimmedMean(share=share)
    order = data.draw(st.permutations(range(len(rows))))
    assert merged(merger, rows).tobytes() == merged(merger, rows[order]).tobytes()


def test_float_sums_in_another_order_would_differ():
    column = np.array([1e8, 0.1, -1e8, 0.3, 1e-3, -0.7, 0.2], "f4")
    sums = {float(np.cumsum(np.roll(column, k), dtype="f4")[-1]) for k in range(7)}
    assert len(sums) > 1
    results = {
        merged(TrimmedMean(share=0), np.roll(column, k)[:, None]).tobytes() for k in range(7)
    }
    assert len(results) == 1


def test_both_zeros_give_the_same_bits_in_any_order():
    for zeros in permutations([0.0, -0.0, -0.0, 0.0, -0.0]):
        column = np.array(zeros)[:, None]
        assert merged(TrimmedMean(share=0.4), column).tobytes() == bytes(4)


def test_known_answer():
    found = merged(TrimmedMean(share=1 / 7), KNOWN)
    np.testing.assert_allclose(found, (1.05, 0.97), atol=1e-5)


def test_a_share_that_floats_round_down_cuts_as_many_as_it_says():
    # 0.29 · 100 is 28.999999999999996
    column = np.arange(100.0)[:, None]
    column[71:] = 1e6
    assert merged(TrimmedMean(share=0.29), column)[0] == pytest.approx(np.arange(29, 71).mean())


@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_something_is_left_when_the_share_is_as_near_a_half_as_can_be(count):
    rows = np.arange(float(count))[:, None]
    found = merged(TrimmedMean(share=float(np.nextafter(0.5, 0))), rows)
    assert found[0] == pytest.approx((count - 1) / 2)


@pytest.mark.parametrize(("honest", "liars", "share"), [(4, 1, 0.2), (6, 4, 0.4), (9, 1, 0.1)])
def test_liars_up_to_the_share_leave_every_value_among_the_honest(honest, liars, share):
    rows = attacked(honest, liars)
    found = merged(TrimmedMean(share=share), rows)
    assert (rows[:honest].min(axis=0) <= found).all()
    assert (found <= rows[:honest].max(axis=0)).all()
    # one liar more than the share is one too many
    assert (merged(TrimmedMean(share=share), attacked(honest - 1, liars + 1)) > 1e4).all()


def test_nothing_is_trimmed_when_there_are_too_few():
    assert merged(TrimmedMean(share=0.2), [[0], [0], [0], [4]])[0] == 1


@pytest.mark.parametrize("share", [-0.1, 0.5, 1, np.nan, "0.1", None, True])
def test_a_share_outside_its_range_is_refused(share):
    with pytest.raises(MergeError, match=r"share: expected from 0 to below 0\.5"):
        TrimmedMean(share=share)
