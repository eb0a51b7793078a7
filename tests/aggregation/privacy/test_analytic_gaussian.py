# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from aggregation.errors import PrivacyError
from aggregation.privacy.analytic_gaussian import (
    analytic_multiplier,
    gaussian_delta,
    gaussian_epsilon,
)

EPSILONS = st.floats(0.01, 60)
DELTAS = st.floats(1e-12, 0.4)


@given(EPSILONS, DELTAS)
def test_the_noise_is_that_of_dp_accounting(epsilon, delta):
    from dp_accounting.gaussian_mechanism import get_sigma_gaussian

    assert analytic_multiplier(epsilon, delta) == pytest.approx(
        get_sigma_gaussian(epsilon, delta), rel=1e-6
    )


@given(EPSILONS, DELTAS)
def test_the_noise_is_just_enough(epsilon, delta):
    multiplier = analytic_multiplier(epsilon, delta)
    assert gaussian_delta(multiplier, epsilon) <= delta
    assert gaussian_delta(multiplier * (1 - 1e-6), epsilon) > delta
    assert gaussian_epsilon(multiplier, delta) == pytest.approx(epsilon, rel=1e-6)
    assert gaussian_delta(multiplier, gaussian_epsilon(multiplier, delta)) <= delta


@given(st.floats(0.2, 20), st.floats(0, 20))
def test_delta_is_the_formula_of_the_theorem(multiplier, epsilon):
    above = stats.norm.cdf(0.5 / multiplier - epsilon * multiplier)
    below = stats.norm.cdf(-0.5 / multiplier - epsilon * multiplier)
    literal = above - math.exp(epsilon) * below
    assert gaussian_delta(multiplier, epsilon) == pytest.approx(literal, rel=1e-6, abs=1e-13)


def test_far_tails_are_still_numbers():
    assert 0 <= gaussian_delta(50.0, 30.0) < 1e-300
    assert gaussian_delta(0.01, 1.0) == pytest.approx(1.0)
    assert gaussian_epsilon(1000.0, 0.3) == 0.0


def test_it_is_less_noise_than_the_textbook_asks_for():
    for epsilon in (0.1, 0.5, 0.99):
        textbook = math.sqrt(2 * math.log(1.25 / 1e-5)) / epsilon
        assert analytic_multiplier(epsilon, 1e-5) < textbook


@pytest.mark.parametrize(
    ("epsilon", "delta"),
    [(0, 1e-5), (-1, 1e-5), (math.inf, 1e-5), (math.nan, 1e-5), (1, 0), (1, 1)],
)
def test_settings_that_mean_nothing_are_refused(epsilon, delta):
    with pytest.raises(PrivacyError):
        analytic_multiplier(epsilon, delta)
