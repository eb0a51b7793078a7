# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from aggregation.errors import MergeError
from aggregation.mergers.breadcrumbs import Breadcrumbs
from protocol import ParamSpec

UPDATES = st.integers(1, 12).flatmap(
    lambda columns: npst.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 3), st.just(columns)),
        # few values, so that magnitudes are equal
        elements=st.integers(-6, 6).map(float),
    )
)
PERCENT = st.integers(0, 100)


def merged(merger, updates, weights=None) -> np.ndarray:
    state = merger.init(ParamSpec.of({"a": updates[0]}))
    for number, update in enumerate(updates):
        state = merger.add(state, {"a": update}, 1.0 if weights is None else weights[number])
    return merger.finish(state).delta["a"]


def slow_row(row: list[float], kept: int, outliers: int) -> list[float]:
    """Shares in percent, as whole numbers."""
    by_size = sorted(range(len(row)), key=lambda i: (-abs(row[i]), i))
    drop = min(len(row) - 1, len(row) * outliers // 100)
    keep = by_size[drop:][: max(1, len(row) * kept // 100)]
    return [value if i in keep else 0.0 for i, value in enumerate(row)]


@given(UPDATES, PERCENT.filter(bool), PERCENT.filter(lambda percent: percent < 100))
def test_the_sum_is_that_of_the_slow_oracle(updates, kept, outliers):
    merger = Breadcrumbs(scaling=0.5, kept=kept / 100, outliers=outliers / 100)
    masked = [[slow_row(row, kept, outliers) for row in update] for update in updates.tolist()]
    np.testing.assert_allclose(
        merged(merger, updates), 0.5 * np.sum(masked, axis=0), rtol=1e-6, atol=1e-6
    )


def test_rows_are_along_the_last_dimension():
    update = np.arange(1, 21, dtype="f4").reshape(1, 2, 10)
    found = merged(Breadcrumbs(scaling=1, kept=0.2, outliers=0.1), update)
    assert np.flatnonzero(found[0]).tolist() == [7, 8]
    assert np.flatnonzero(found[1]).tolist() == [7, 8]


def test_shares_that_floats_round_down_count_as_many_as_they_say():
    # 0.29 · 100 is 28.999999999999996
    found = merged(Breadcrumbs(kept=0.29, outliers=0.29), np.arange(1, 101.0, dtype="f4")[None])
    assert np.flatnonzero(found).tolist() == list(range(42, 71))


def test_keeping_all_and_dropping_none_is_the_scaled_sum():
    updates = np.random.default_rng(0).normal(size=(3, 2, 5)).astype("f4")
    found = merged(Breadcrumbs(scaling=0.7, kept=1, outliers=0), updates)
    np.testing.assert_allclose(found, 0.7 * updates.sum(axis=0), rtol=1e-5)


def test_a_row_shorter_than_one_over_the_share_keeps_its_largest():
    found = merged(Breadcrumbs(scaling=1), np.array([[[1, -3, 2], [0, 0, -1]]], "f4"))
    np.testing.assert_array_equal(found, [[0, -3, 0], [0, 0, -1]])


def test_a_scalar_stays_as_it_is():
    found = merged(Breadcrumbs(scaling=1), [np.array(2.5, "f4"), np.array(-1, "f4")])
    assert found.shape == () and found == 1.5


def test_weights_shift_the_sum_towards_those_that_weigh_more():
    updates = np.array([[[4.0]], [[0.0]]], "f4")
    assert merged(Breadcrumbs(scaling=1), updates, [3, 1]) == 2 * 4 * 3 / 4


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("scaling", 0),
        ("scaling", np.inf),
        ("kept", 0),
        ("kept", 1.01),
        ("kept", np.nan),
        ("outliers", -0.1),
        ("outliers", 1),
        ("outliers", None),
    ],
)
def test_a_setting_outside_its_range_is_refused(setting, value):
    with pytest.raises(MergeError, match=f"{setting}: expected"):
        Breadcrumbs(**{setting: value})
