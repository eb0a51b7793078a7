# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from aggregation.errors import PrivacyError
from aggregation.privacy.clipping import clip, l2_norm

FLOATS = st.floats(-(2.0**60), 2.0**60, width=32)
UPDATES = st.dictionaries(
    st.sampled_from("abc"),
    npst.arrays(np.float32, npst.array_shapes(max_dims=2, max_side=5), elements=FLOATS),
    min_size=1,
)
BOUNDS = st.floats(1e-6, 1e6)


def exact_square(delta) -> Fraction:
    return sum(
        (Fraction(float(x)) ** 2 for value in delta.values() for x in value.reshape(-1)),
        Fraction(0),
    )


@given(UPDATES, BOUNDS)
def test_no_clipped_update_is_longer_than_the_bound_by_exact_arithmetic(delta, bound):
    found = clip(delta, bound)
    if not found.unclipped:
        assert exact_square(found.delta) <= Fraction(bound) ** 2
        # ... and it is the whole of the bound, but for the last bits of each value
        size = sum(value.size for value in delta.values())
        lost = bound * 1e-6 + size * 2.0**-149
        assert l2_norm(found.delta) >= bound - lost
    else:
        assert all(found.delta[name] is delta[name] for name in delta)
        assert exact_square(delta) <= Fraction(bound) ** 2 * Fraction(1 + 1e-12)


@given(UPDATES, BOUNDS)
def test_clipping_again_gives_the_same_bits_and_leaves_the_arguments_alone(delta, bound):
    before = {name: value.copy() for name, value in delta.items()}
    once = clip(delta, bound)
    twice = clip(once.delta, bound)
    assert twice.unclipped
    for name in delta:
        assert twice.delta[name].tobytes() == once.delta[name].tobytes()
        assert twice.delta[name].dtype == np.float32
        assert before[name].tobytes() == delta[name].tobytes()


def test_the_norm_is_that_of_all_tensors_together():
    found = clip({"a": np.full(4, 3, "f4"), "b": np.full((2, 2), 4, "f4")}, 5.0)
    assert found.norm == 10.0 and not found.unclipped
    np.testing.assert_allclose(found.delta["a"], np.full(4, 1.5), rtol=1e-6)
    np.testing.assert_allclose(found.delta["b"], np.full((2, 2), 2), rtol=1e-6)


def test_an_update_of_norm_0_and_one_of_the_bound_itself_are_not_clipped():
    zero = clip({"a": np.zeros(3, "f4")}, 1.0)
    assert zero.unclipped and zero.norm == 0
    assert not zero.delta["a"].any()
    assert clip({"a": np.array([3, 4], "f4")}, 5.0).unclipped
    assert clip({}, 1.0).unclipped


def test_a_long_update_has_its_norm_to_twelve_digits():
    value = np.random.default_rng(0).normal(size=100_003).astype(np.float32)
    exact = math.sqrt(math.fsum((value.astype(np.float64) ** 2).tolist()))
    assert l2_norm({"a": value[:50_000], "b": value[50_000:]}) == pytest.approx(exact, rel=1e-13)


def test_a_norm_beyond_float32_is_clipped_all_the_same():
    found = clip({"a": np.full(100, 3e38, "f4")}, 1.0)
    assert 1 - 1e-6 < l2_norm(found.delta) <= 1.0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_is_refused_by_name(value):
    delta = {"a": np.zeros(3, "f4"), "b": np.array([0, value], "f4")}
    with pytest.raises(PrivacyError, match='"b": expected finite'):
        clip(delta, 1.0)


@pytest.mark.parametrize("bound", [0, -1.0, np.nan, np.inf, "1", None, True])
def test_a_bound_that_bounds_nothing_is_refused(bound):
    with pytest.raises(PrivacyError, match="clip: expected a finite norm above 0"):
        clip({"a": np.zeros(3, "f4")}, bound)


def test_other_types_are_refused():
    with pytest.raises(PrivacyError, match="expected float32"):
        clip({"a": np.zeros(3)}, 1.0)
