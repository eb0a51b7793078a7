# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.errors import PrivacyError
from aggregation.privacy.discrete_gaussian import discrete_gaussian
from aggregation.privacy.distributed_gaussian import (
    accounted_multiplier,
    noise_reach,
    share_multiplier,
    share_variance,
    sum_divergence,
    summed_multiplier,
)
from aggregation.privacy.keystream import Keystream


@given(st.floats(0.1, 10), st.floats(0.1, 10), st.integers(1, 200), st.integers(0, 50), st.data())
def test_with_the_fewest_survivors_and_the_most_traitors_noise_is_what_was_accounted(
    multiplier, bound, honest, colluding, data
):
    step = bound / 2**20
    fewest = honest + colluding
    each = share_multiplier(multiplier, fewest=fewest, colluding=colluding)
    assert Fraction(each) ** 2 * honest >= Fraction(multiplier) ** 2
    share = share_variance(each, bound, step)
    survivors = data.draw(st.integers(fewest, fewest + 100))
    found = summed_multiplier(share, survivors - colluding, bound, step)
    assert found >= multiplier * (1 - 1e-12)
    if survivors == fewest:
        assert found == pytest.approx(multiplier)
        assert summed_multiplier(share, survivors - colluding - 1, bound, step) < multiplier


def test_shares_of_real_samples_add_up_to_the_noise():
    share = share_variance(share_multiplier(1.0, fewest=8), 1.0, 2.0**-12)
    stream = Keystream(bytes(32), "shares")
    total = sum(discrete_gaussian(share, 20_000, stream) for _ in range(8))
    assert total.std() * 2.0**-12 == pytest.approx(1.0, rel=0.03)


@pytest.mark.parametrize(
    "settings",
    [
        {"fewest": 0},
        {"fewest": 3, "colluding": 3},
        {"fewest": 3, "colluding": -1},
        {"multiplier": 0.0, "fewest": 3},
        {"multiplier": math.nan, "fewest": 3},
    ],
)
def test_shares_that_do_not_add_up_to_privacy_are_refused(settings):
    with pytest.raises(PrivacyError):
        share_multiplier(**{"multiplier": 1.0, **settings})


def test_shares_of_less_than_a_few_steps_are_refused():
    assert share_variance(4.0, 1.0, 1.0) == 16
    for share in (3.99, 0.0, -1.0, math.inf, math.nan):
        with pytest.raises(PrivacyError):
            share_variance(share, 1.0, 1.0)


@given(st.fractions(16, 10**12), st.integers(1, 1000))
def test_a_sum_has_room_for_its_noise(variance, clients):
    reach = noise_reach(variance, clients)
    assert (reach - 1) ** 2 <= 144 * variance * clients + 1
    assert reach**2 >= 144 * variance * clients


def pmf(variance: float, reach: int) -> np.ndarray:
    weights = np.exp(-(np.arange(-reach, reach + 1.0) ** 2) / (2 * variance))
    return weights / weights.sum()


@pytest.mark.parametrize(("variance", "count"), [(0.25, 2), (0.25, 10), (0.5, 2), (0.5, 10)])
def test_a_sum_differs_from_a_discrete_gaussian_by_no_more_than_the_bound(variance, count):
    one = pmf(variance, 40)
    summed = one
    for _ in range(count - 1):
        summed = np.convolve(summed, one)
    whole = pmf(variance * count, len(summed) // 2)
    reach = math.ceil(4 * math.sqrt(variance * count))
    middle = slice(len(summed) // 2 - reach, len(summed) // 2 + reach + 1)
    worst = np.abs(np.log(summed[middle]) - np.log(whole[middle])).max()
    bound = sum_divergence(Fraction(variance), count)
    assert worst <= bound
    assert worst > bound / 1e3  # it is about this difference, not about another


def test_the_bound_falls_with_the_shares_and_is_nothing_from_the_least_on():
    assert sum_divergence(Fraction(1), 1) == 0
    assert sum_divergence(Fraction(16), 1000) < 1e-60
    assert sum_divergence(Fraction(1), 500) >= sum_divergence(Fraction(1), 50) > 0
    # after the first hundred terms each is counted as the hundredth: never less than the sum
    plain = 10 * math.fsum(math.exp(-2 * math.pi**2 * k / (k + 1)) for k in range(1, 500))
    assert plain <= sum_divergence(Fraction(1), 500) < 1.01 * plain
    with pytest.raises(PrivacyError):
        sum_divergence(Fraction(1, 8), 5)


def test_what_the_sum_costs_is_taken_from_the_multiplier():
    assert accounted_multiplier(2.0, 0.0, 10**6) == 2.0
    assert accounted_multiplier(2.0, 1e-6, 10**6) < 2.0
    assert accounted_multiplier(2.0, sum_divergence(Fraction(16), 100), 10**6) == 2.0
