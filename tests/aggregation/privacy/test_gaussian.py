# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy import stats

from aggregation.errors import PrivacyError
from aggregation.privacy.analytic_gaussian import gaussian_delta
from aggregation.privacy.clipping import clip
from aggregation.privacy.gaussian import Noise, count_noise, in_steps, noised_mean
from protocol import ParamSpec

SEED = bytes(range(32))
ROWS = npst.arrays(np.float32, (4, 6), elements=st.floats(-100, 100, width=32))


@given(st.floats(1e-6, 1e6), st.floats(1e-4, 1e4))
def test_the_step_is_a_power_of_two_and_the_noise_two_to_the_32_of_them(bound, multiplier):
    noise = Noise(clip=bound, multiplier=multiplier)
    assert math.frexp(noise.step)[0] == 0.5
    assert 2**64 <= noise.variance < 2**66
    assert (
        noise.variance * Fraction(noise.step) ** 2 == (Fraction(bound) * Fraction(multiplier)) ** 2
    )
    longest = Fraction(bound) / Fraction(noise.step)
    assert longest * noise.most < 2**63 and longest * (noise.most + 2) > 2**62
    assert noise.most >= 1 << 15


@given(ROWS, st.floats(0.1, 50), st.sampled_from([1e-4, 0.5, 3.0, 1e4]))
def test_one_client_more_moves_the_sum_by_no_more_than_the_norm_in_exact_arithmetic(
    rows, bound, multiplier
):
    noise = Noise(clip=bound, multiplier=multiplier)
    spec = ParamSpec.of({"a": rows[0]})
    steps = [in_steps(spec, clip({"a": row}, bound).delta, noise.step) for row in rows]
    moved = sum(steps) - sum(steps[1:])
    square = sum(int(x) ** 2 for x in moved)
    assert square * Fraction(noise.step) ** 2 <= Fraction(bound) ** 2
    # ... and what the grid takes from a value is less than a step
    clipped = clip({"a": rows[0]}, bound).delta["a"].astype(np.float64)
    assert np.abs(steps[0] * noise.step - clipped).max() < noise.step


def test_the_mean_is_divided_by_who_was_expected_and_noised_as_asked():
    noise = Noise(clip=2.0, multiplier=1.5)
    sums = np.full(60_000, round(4.0 / noise.step), np.int64)
    found = noised_mean(sums, noise, expected=8.0, seed=SEED, use="update")
    deviation = 1.5 * 2.0 / 8
    assert stats.kstest((found - 0.5) / deviation, "norm").pvalue > 1e-4
    assert found.std() == pytest.approx(deviation, rel=0.02)


def test_noise_is_that_of_its_seed_and_use():
    noise, sums = Noise(clip=1.0, multiplier=1.0), np.zeros(100, np.int64)
    first = noised_mean(sums, noise, expected=1.0, seed=SEED, use="update")
    again = noised_mean(sums, noise, expected=1.0, seed=SEED, use="update")
    assert np.array_equal(first, again)
    for seed, use in ((SEED, "count"), (bytes(32), "update")):
        other = noised_mean(sums, noise, expected=1.0, seed=seed, use=use)
        assert not (first == other).any()


def discrete_delta(deviation: int, shift: int, epsilon: float) -> float:
    """δ at ε of the discrete Gaussian when values move by so many steps, as it is defined."""
    steps = np.arange(-40 * deviation, 40 * deviation + 1.0)
    here = np.exp(-((steps - shift) ** 2) / (2 * deviation**2))
    there = np.exp(-(steps**2) / (2 * deviation**2))
    total = there.sum()
    return float(np.maximum(here - math.exp(epsilon) * there, 0).sum() / total)


@pytest.mark.parametrize("multiplier", [1, 2, 4])
@pytest.mark.parametrize("epsilon", [0.1, 0.37, 1.0, 1.3, 3.0])
def test_delta_of_noise_in_steps_is_that_of_the_gaussian_the_closer_the_finer(multiplier, epsilon):
    for deviation in (8, 16, 32, 64, 256):
        found = discrete_delta(deviation, deviation // multiplier, epsilon)
        assert abs(found - gaussian_delta(multiplier, epsilon)) < 0.04 / deviation**2


@pytest.mark.parametrize("order", [2, 3, 7])
def test_renyi_moments_of_noise_in_steps_are_those_of_the_gaussian(order):
    deviation, shift = 3, 2
    steps = np.arange(-200, 201.0)
    there = np.exp(-(steps**2) / (2 * deviation**2))
    there /= there.sum()
    ratio = np.exp((2 * steps * shift - shift**2) / (2 * deviation**2))
    moment = float((there * ratio**order).sum())
    wanted = math.exp((order**2 - order) * shift**2 / (2 * deviation**2))
    assert moment == pytest.approx(wanted, rel=1e-12)


def test_every_release_lies_on_the_grid():
    noise = Noise(clip=0.3, multiplier=0.7)
    found = noised_mean(np.arange(1000), noise, expected=1.0, seed=SEED, use="update")
    assert np.array_equal(found / noise.step, np.rint(found / noise.step))


def test_the_count_has_the_noise_that_it_was_given():
    drawn = [
        count_noise(2.5, bytes([i, j] + [0] * 30), "count") for i in range(30) for j in range(20)
    ]
    assert stats.kstest(np.array(drawn) / 2.5, "norm").pvalue > 1e-4


@pytest.mark.parametrize(
    "settings",
    [
        {"clip": 0.0, "multiplier": 1.0},
        {"clip": math.nan, "multiplier": 1.0},
        {"clip": 1.0, "multiplier": 0.0},
        {"clip": 1.0, "multiplier": math.inf},
        {"clip": 1.0, "multiplier": math.nan},
        {"clip": 1.0, "multiplier": 1e-5},
        {"clip": 1e300, "multiplier": 1.0},
    ],
)
def test_noise_that_hides_nothing_is_refused(settings):
    with pytest.raises(PrivacyError):
        Noise(**settings)


@pytest.mark.parametrize("expected", [0.0, -1.0, math.inf])
def test_a_divisor_that_is_none_is_refused(expected):
    noise = Noise(clip=1.0, multiplier=1.0)
    with pytest.raises(PrivacyError, match="number of clients"):
        noised_mean(np.zeros(1, np.int64), noise, expected=expected, seed=SEED, use="update")
