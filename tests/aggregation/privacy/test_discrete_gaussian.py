# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
import time
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from aggregation.errors import PrivacyError
from aggregation.privacy import discrete_gaussian as module
from aggregation.privacy.discrete_gaussian import (
    discrete_gaussian,
    discrete_gaussian_literally,
    exp_bounds,
)
from aggregation.privacy.keystream import Keystream

SEED = bytes(range(32))


def probabilities(variance: Fraction, reach: int) -> dict[int, float]:
    weights = {x: math.exp(-(x**2) / (2 * float(variance))) for x in range(-reach, reach + 1)}
    total = math.fsum(weights.values())
    return {x: weight / total for x, weight in weights.items()}


def chi_square(found: Counter[int], expected: dict[int, float], count: int) -> float:
    """The chance of a fit as bad, with rare values taken together."""
    common = [x for x, p in expected.items() if p * count >= 10]
    seen = [found[x] for x in common]
    wanted = [expected[x] * count for x in common]
    seen.append(count - sum(seen))
    wanted.append(count - sum(wanted))
    if wanted[-1] < 1e-6:
        assert seen.pop() == 0
        wanted.pop()
    return float(stats.chisquare(seen, np.array(wanted) * sum(seen) / sum(wanted)).pvalue)


@pytest.mark.parametrize(
    "variance", [Fraction(1, 10), Fraction(1, 3), Fraction(2), Fraction(50, 7), Fraction(400)]
)
def test_fast_samples_have_the_probabilities_of_the_formula(variance):
    count = 200_000
    drawn = discrete_gaussian(variance, count, Keystream(SEED, f"chi {variance}"))
    expected = probabilities(variance, 12 * math.isqrt(math.ceil(variance)) + 12)
    assert chi_square(Counter(drawn.tolist()), expected, count) > 1e-4


@pytest.mark.parametrize("variance", [Fraction(1, 3), Fraction(50, 7)])
def test_literal_samples_have_them_too_and_the_test_tells_others_apart(variance):
    stream, count = Keystream(SEED, "literal"), 10_000
    drawn = Counter(discrete_gaussian_literally(variance, stream) for _ in range(count))
    expected = probabilities(variance, 60)
    assert chi_square(drawn, expected, count) > 1e-4
    assert chi_square(drawn, probabilities(variance * Fraction(6, 5), 60), count) < 1e-4


def test_fast_and_literal_samples_are_of_one_distribution():
    variance = Fraction(12345, 10)
    fast = discrete_gaussian(variance, 20_000, Keystream(SEED, "fast"))
    stream = Keystream(SEED, "slow")
    slow = [discrete_gaussian_literally(variance, stream) for _ in range(3000)]
    assert stats.ks_2samp(fast, slow).pvalue > 1e-4
    assert stats.ks_2samp(fast * 1.1, slow).pvalue < 1e-3  # ... and the test can fail


def test_with_many_steps_it_is_the_normal_distribution():
    variance = Fraction(2) ** 64 * 3
    drawn = discrete_gaussian(variance, 100_000, Keystream(SEED, "wide"))
    scaled = drawn / math.sqrt(variance)
    assert stats.kstest(scaled, "norm").pvalue > 1e-4
    assert abs(scaled.mean()) < 5 / math.sqrt(len(scaled))
    assert abs(scaled.var() - 1) < 5 * math.sqrt(2 / len(scaled))
    # all bits are noise: the last ones too
    assert abs(float((drawn & 1).mean()) - 0.5) < 0.01


@pytest.mark.parametrize("variance", [Fraction(1, 7), Fraction(10**7, 3)])
def test_what_float64_decides_is_what_exact_arithmetic_decides(variance, monkeypatch):
    quick = discrete_gaussian(variance, 300, Keystream(SEED, "same"))
    # No decision is left to float64.
    monkeypatch.setattr(module, "_MARGIN", 2.0)
    exact = discrete_gaussian(variance, 300, Keystream(SEED, "same"))
    assert np.array_equal(quick, exact)


def test_bits_are_drawn_until_a_comparison_is_certain():
    exponent = Fraction(1, 3)
    low, high = exp_bounds(exponent, 400)
    word = int(low * 2**64)  # the first 64 bits of exp(-1/3) itself
    outcomes = set()
    for number in range(40):
        real = module._Real(word, Keystream(SEED, f"more {number}"))
        below = real.is_below_exp(exponent)
        assert real._bits > 64
        assert below == (Fraction(real._word, 1 << real._bits) < high)
        outcomes.add(below)
    assert outcomes == {True, False}


@given(st.fractions(0, 60, max_denominator=10**9).filter(bool), st.integers(8, 200))
def test_bounds_of_exp_hold_it_between_them(exponent, bits):
    low, high = exp_bounds(exponent, bits)
    finer_low, finer_high = exp_bounds(exponent, bits + 200)
    assert low <= finer_low <= finer_high <= high
    assert high - low <= Fraction(1, 1 << bits)
    assert float(low) <= math.exp(-exponent) * (1 + 1e-12) + 1e-300


def test_the_same_stream_gives_the_same_values_whatever_number_is_asked_for():
    variance = Fraction(99)
    many = discrete_gaussian(variance, 2000, Keystream(SEED, "again"))
    assert np.array_equal(many, discrete_gaussian(variance, 2000, Keystream(SEED, "again")))
    assert len(discrete_gaussian(variance, 0, Keystream(SEED, "none"))) == 0
    other = discrete_gaussian(variance, 2000, Keystream(SEED, "other"))
    assert not np.array_equal(many, other)


@pytest.mark.parametrize("variance", [Fraction(0), Fraction(-1), Fraction(2) ** 91])
def test_variances_out_of_range_are_refused(variance):
    with pytest.raises(PrivacyError, match="variance: expected"):
        discrete_gaussian(variance, 1, Keystream(SEED, "no"))
    with pytest.raises(PrivacyError, match="variance: expected"):
        discrete_gaussian_literally(variance, Keystream(SEED, "no"))


def test_the_fast_sampler_is_many_times_faster_than_the_literal_one():
    variance, stream = Fraction(10**12), Keystream(SEED, "speed")

    def seconds_each(count: int, draw) -> float:
        best = math.inf
        for _ in range(3):
            started = time.perf_counter()
            draw(count)
            best = min(best, (time.perf_counter() - started) / count)
        return best

    fast = seconds_each(50_000, lambda n: discrete_gaussian(variance, n, stream))
    literal = seconds_each(
        100, lambda n: [discrete_gaussian_literally(variance, stream) for _ in range(n)]
    )
    assert fast < literal / 25
