# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from aggregation import Seeds
from aggregation.codecs.grid import RANGE, Grid

VALUES = npst.arrays(np.float32, st.integers(1, 30), elements=st.floats(-6, 6, width=32))


@given(values=VALUES, bits=st.integers(1, 16), own=st.integers(0, 2**64 - 1))
def test_each_value_goes_to_one_of_its_two_neighbours(
    values: np.ndarray, bits: int, own: int
) -> None:
    grid = Grid(bits=bits, norm=1.0)
    integers = grid.to_grid(values, Seeds(own=own))
    for value, integer in zip(values.tolist(), integers.tolist(), strict=True):
        place = min(max((value + RANGE) / (2 * RANGE) * (2**bits - 1), 0), 2**bits - 1)
        assert integer in (math.floor(place), math.ceil(place)) or integer == pytest.approx(
            place, abs=1e-9
        )


def test_rounding_is_right_on_average() -> None:
    grid = Grid(bits=4, norm=1.0)
    values = np.linspace(-4, 4, 9, dtype=np.float32)
    draws = [grid.to_grid(values, Seeds(own=own)) for own in range(4000)]
    decoded = grid.from_grid(np.mean(draws, axis=0, dtype=np.float64).astype(np.float32))
    # The mean of 4,000 errors below a step has a deviation below step / 2 / √4000.
    step = 2 * RANGE / 15
    np.testing.assert_allclose(decoded, values, atol=5 * step / 2 / math.sqrt(4000))


def test_the_ends_of_the_range_are_the_ends_of_the_grid() -> None:
    grid = Grid(bits=8, norm=1.0)
    ends = np.array([-RANGE - 1, -RANGE, RANGE, RANGE + 1], np.float32)
    assert grid.to_grid(ends, Seeds()).tolist() == [0, 0, 255, 255]
    assert grid.from_grid(np.array([0, 255], np.float32)).tolist() == [-RANGE, RANGE]
