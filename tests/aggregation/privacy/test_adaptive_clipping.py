# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest

from aggregation.errors import PrivacyError
from aggregation.privacy.adaptive_clipping import (
    default_count_noise,
    next_bound,
    noised_share,
    update_multiplier,
)


@pytest.mark.parametrize(
    ("multiplier", "clients", "left"), [(1, 100, 1.00504), (1, 20, 1.15470), (0.5, 50, 0.50252)]
)
def test_the_noise_is_split_as_computed_elsewhere(multiplier, clients, left):
    found = update_multiplier(multiplier, default_count_noise(clients))
    assert found == pytest.approx(left, abs=5e-6)


@pytest.mark.parametrize("multiplier", [0.3, 1.0, 1.9])
def test_updates_and_count_together_are_one_gaussian_of_the_whole_multiplier(multiplier):
    noise = 1.0
    updates = update_multiplier(multiplier, noise)
    # A client shifts the updates by 1/z_delta and the count by 1/2 of its noise, at right angles.
    assert math.hypot(1 / updates, 0.5 / noise) == pytest.approx(1 / multiplier, rel=1e-12)


@pytest.mark.parametrize(
    ("multiplier", "noise"), [(2, 1), (2.5, 1), (0, 1), (-1, 1), (1, math.inf)]
)
def test_a_count_that_alone_costs_more_than_everything_is_refused(multiplier, noise):
    with pytest.raises(PrivacyError, match="twice the noise of the count"):
        update_multiplier(multiplier, noise)


def runs(start: float, quantile: float, rounds: int = 200, noise: float = 0.0) -> float:
    """C after so many rounds of a thousand clients whose norms have the median 1."""
    rng = np.random.default_rng(0)
    bound = start
    for _ in range(rounds):
        norms = rng.lognormal(0, 0.5, 1000)
        unclipped = int((norms <= bound).sum())
        share = noised_share(unclipped, 1000, noise * rng.standard_normal(), expected=1000)
        bound = next_bound(bound, share, quantile=quantile)
    return bound


@pytest.mark.parametrize("start", [0.1, 5.0])
@pytest.mark.parametrize("noise", [0.0, 50.0])
def test_the_norm_goes_to_the_quantile_from_below_and_from_above(start, noise):
    # Were the clipped counted, it would run away: to 2e-10 from below, to 2e9 from above.
    assert runs(start, 0.5, noise=noise) == pytest.approx(1.0, abs=0.05)
    quantile = math.exp(0.5 * 1.2815515655446004)  # of 90 %
    assert runs(start, 0.9, noise=noise) == pytest.approx(quantile, rel=0.1)


def test_one_step_is_that_of_the_formula():
    assert next_bound(2.0, 0.9, quantile=0.5, rate=0.2) == 2.0 * math.exp(-0.2 * 0.4)
    assert next_bound(2.0, 0.5, quantile=0.5) == 2.0
    assert next_bound(2.0, 0.0, quantile=0.5) > 2.0  # all are clipped: it grows


def test_the_share_is_of_halves_and_divided_by_who_was_expected():
    assert noised_share(30, 100, 0.0, expected=100) == pytest.approx(0.3)
    # 40 of 100 did not answer: they count for neither side.
    assert noised_share(60, 60, 0.0, expected=100) == pytest.approx(0.8)
    assert noised_share(0, 0, 0.0, expected=100) == 0.5
    assert noised_share(30, 100, 5.0, expected=100) == pytest.approx(0.35)


def test_one_client_moves_the_share_by_half_a_count():
    with_it = noised_share(31, 61, 0.0, expected=100)
    without = [noised_share(30, 60, 0.0, expected=100), noised_share(31, 60, 0.0, expected=100)]
    assert {abs(round((with_it - share) * 100, 9)) for share in without} == {0.5}


def test_noise_without_a_bound_gives_a_norm_with_one():
    assert 0 < next_bound(1.0, 1e300, quantile=0.5) < 1e-10
    assert 1e10 < next_bound(1.0, -1e300, quantile=0.5) < math.inf


@pytest.mark.parametrize(
    "settings", [{"quantile": 0.0}, {"quantile": 1.0}, {"quantile": 0.5, "rate": 0.0}]
)
def test_settings_that_find_no_quantile_are_refused(settings):
    with pytest.raises(PrivacyError):
        next_bound(1.0, 0.5, **settings)
    with pytest.raises(PrivacyError):
        next_bound(1.0, math.nan, quantile=0.5)
    with pytest.raises(PrivacyError, match="unclipped"):
        noised_share(3, 2, 0.0, expected=10)
