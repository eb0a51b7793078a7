# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from aggregation.mergers.uniform_soup import UniformSoup
from aggregation.mergers.weighted_mean import WeightedMean
from protocol import ParamSpec

ROWS = npst.arrays(
    np.float32,
    st.tuples(st.integers(1, 6), st.integers(1, 5)),
    elements=st.floats(-1e3, 1e3, width=32),
)


def merged(merger, rows, weights=None) -> np.ndarray:
    state = merger.init(ParamSpec.of({"a": rows[0]}))
    for number, row in enumerate(rows):
        weight = 1.0 if weights is None else weights[number]
        state = merger.add(state, {"a": row}, weight, client=f"c{number}")
    return merger.finish(state).delta["a"]


@given(ROWS, st.data())
def test_it_is_the_plain_mean_whatever_the_weights(rows, data):
    weights = data.draw(st.lists(st.floats(1e-6, 1e6), min_size=len(rows), max_size=len(rows)))
    found = merged(UniformSoup(), rows, weights)
    expected = [math.fsum(column) / len(rows) for column in rows.T.tolist()]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
    assert found.tobytes() == merged(UniformSoup(), rows).tobytes()


@given(ROWS)
def test_it_is_the_weighted_mean_of_equal_weights(rows):
    assert merged(UniformSoup(), rows).tobytes() == merged(WeightedMean(), rows).tobytes()
