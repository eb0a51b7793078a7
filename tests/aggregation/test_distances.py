# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from aggregation.robust.distances import inner_products, squared_distances, squared_norm
from aggregation.stack import Stack

ROWS = npst.arrays(
    np.float32,
    st.tuples(st.integers(1, 6), st.integers(1, 9)),
    elements=st.floats(-1e3, 1e3, width=32),
)


def stacked(rows) -> Stack:
    stack = Stack(rows.shape[1])
    for row in rows:
        stack = stack.with_row(row)
    return stack


@pytest.mark.parametrize("block", [1 << 20, 5])
@given(rows=ROWS)
def test_products_and_distances_are_those_of_loops(block, rows):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aggregation.stack.BLOCK_VALUES", block)
        products, distances = inner_products(stacked(rows)), squared_distances(stacked(rows))
    scale = max(float(np.square(rows.astype("f8")).sum(axis=1).max()), 1e-30)
    for i, a in enumerate(rows.tolist()):
        for j, b in enumerate(rows.tolist()):
            product = math.fsum(x * y for x, y in zip(a, b, strict=True))
            assert products[i, j] == pytest.approx(product, abs=1e-12 * scale)
            assert distances[i, j] == pytest.approx(math.dist(a, b) ** 2, abs=1e-12 * scale)
    assert (distances >= 0).all() and not np.diag(distances).any()


def test_rows_that_differ_by_rounding_are_at_no_distance_below_0():
    rng = np.random.default_rng(3)
    rows = np.tile(rng.normal(size=500).astype("f4") * 1000, (20, 1))
    rows[np.arange(20), rng.integers(0, 500, 20)] *= np.float32(1 + 2**-23)
    assert (squared_distances(stacked(rows)) >= 0).all()


def test_a_far_row_leaves_the_distances_of_others_as_they_are():
    rows = np.random.default_rng(0).normal(size=(5, 50)).astype("f4")
    rows[4] = 1e30
    near = squared_distances(stacked(rows[:4]))
    np.testing.assert_allclose(squared_distances(stacked(rows))[:4, :4], near, rtol=1e-12)


def test_the_largest_values_of_float32_do_not_overflow():
    row = np.full(1000, np.finfo(np.float32).max)
    assert squared_norm(row) == pytest.approx(1000 * float(np.finfo(np.float32).max) ** 2)
