# SPDX-License-Identifier: Apache-2.0
"""Samples of the discrete Gaussian, P(x) ∝ exp(-x²/2σ²) on the integers, exactly.

Noise in floating point has holes between its values, by which releases can be told apart (Mironov,
CCS 2012). Integers have none: each value comes with the probability of the formula, so that what is
proven of the distribution is true of the program.

*Source* Canonne, Kamath, Steinke, "The Discrete Gaussian for Differential Privacy", NeurIPS 2020
(arXiv 2004.00010), algorithms 1 to 3: |Y| = U + t·V with U uniform below t, kept with probability
exp(-U/t), and V geometric, P(V ≥ v) = exp(-v); Y has a fair sign and is not minus zero; it is kept
with probability exp(-(|Y| - σ²/t)²/2σ²). `discrete_gaussian_literally` is that, in integers.

*Differs from source* The fast sampler takes for t the power of two next to σ, which is right for
any t, and decides "with probability p" by whether a uniform real R lies below p. R's first 53 bits
and p in float64 decide, wherever their errors cannot matter (they are below 2⁻⁴⁸). Elsewhere, less
than once in 2⁴⁶ draws, R is given more bits and p is bounded by rationals until the answer is
certain. So it is exact too, and the same on every machine, whatever its exp is like.

*Cost* one million values take about half a second on one core and 100 MB.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Final

import numpy as np

from aggregation.errors import PrivacyError
from aggregation.privacy.keystream import Keystream

# What float64 may be wrong by, in comparisons of a uniform with exp(-x): the exponent by
# 2^-50·(1 + x), exp by a few last places, and exp(-x)·(1 + x) is at most 1.
_MARGIN: Final = 2.0**-48
_LARGEST: Final = Fraction(2) ** 90  # variance; values then stay below 2^53
_SMALLEST: Final = Fraction(1, 2**40)
# Of exp(-U/t), of Y and of -0 together somewhat less than half of the candidates are left.
_CANDIDATES: Final = 2.6
_BLOCK: Final = 1 << 20


def discrete_gaussian(variance: Fraction, count: int, stream: Keystream) -> np.ndarray:
    """Independent samples with parameter σ² = `variance`, int64 [count].

    Raises: PrivacyError for a variance outside 2⁻⁴⁰ to 2⁹⁰.
    """
    _require_variance(variance)
    drawn = np.empty(count, np.int64)
    have = 0
    while have < count:
        candidates = int(min(count - have, _BLOCK) * _CANDIDATES) + 64
        kept = _kept(variance, candidates, stream)[: count - have]
        drawn[have : have + len(kept)] = kept
        have += len(kept)
    return drawn


def discrete_gaussian_literally(variance: Fraction, stream: Keystream) -> int:
    """One sample, as the paper's algorithms have it: integers alone, and slow."""
    _require_variance(variance)
    t = math.isqrt(math.floor(variance)) + 1
    while True:
        u = stream.below(t)
        if not _happens(Fraction(u, t), stream):
            continue
        v = 0
        while _happens(Fraction(1), stream):
            v += 1
        negative = stream.bits(1)
        y = u + t * v
        if negative and y == 0:
            continue
        if _happens((y - variance / t) ** 2 / (2 * variance), stream):
            return -y if negative else y


def _require_variance(variance: Fraction) -> None:
    if not _SMALLEST <= variance <= _LARGEST:
        raise PrivacyError(f"variance: expected 2^-40 to 2^90, found {float(variance):g}")


# The fast sampler


def _kept(variance: Fraction, candidates: int, stream: Keystream) -> np.ndarray:
    """What is left of so many candidates, int64."""
    exponent = max(round(math.log2(float(variance)) / 2), 0)
    t = 1 << exponent
    word = stream.words(candidates)
    u = (word & np.uint64(t - 1)).astype(np.int64)
    sign = np.where(word >> np.uint64(63), np.int64(-1), np.int64(1))
    kept = _below(stream.words(candidates), u / t, lambda i: Fraction(int(u[i]), t), stream)
    u, sign = u[kept], sign[kept]
    y = u + t * _geometric(stream.words(len(u)), stream)
    real = (y > 0) | (sign > 0)
    y, sign = y[real], sign[real]
    centre = variance / t
    approximate = (y - float(centre)) ** 2 / float(2 * variance)
    kept = _below(
        stream.words(len(y)),
        approximate,
        lambda i: (int(y[i]) - centre) ** 2 / (2 * variance),
        stream,
    )
    result: np.ndarray = y[kept] * sign[kept]
    return result


def _below(
    words: np.ndarray,
    exponents: np.ndarray,
    exact: Callable[[int], Fraction],
    stream: Keystream,
) -> np.ndarray:
    """Whether uniform reals that begin with `words` lie below exp(-x), bool [len(words)].

    `exponents` are x to within the margin; `exact` gives the x of one place.
    """
    drawn, chance = _leading(words), np.exp(-exponents)
    below: np.ndarray = drawn < chance
    for index in np.flatnonzero(np.abs(drawn - chance) <= _MARGIN):
        below[index] = _Real(int(words[index]), stream).is_below_exp(exact(int(index)))
    return below


def _geometric(words: np.ndarray, stream: Keystream) -> np.ndarray:
    """How many of exp(-1), exp(-2), ... lie above each uniform real, int64 [len(words)]."""
    drawn = _leading(words)
    steps = np.exp(-np.arange(1.0, 64.0))[::-1]
    # Of steps in rising order, those above what was drawn.
    surely = len(steps) - np.searchsorted(steps, drawn + _MARGIN)
    perhaps = len(steps) - np.searchsorted(steps, drawn - _MARGIN)
    counts: np.ndarray = surely.astype(np.int64)
    for index in np.flatnonzero(surely != perhaps):
        real, count = _Real(int(words[index]), stream), 0
        while real.is_below_exp(Fraction(count + 1)):
            count += 1
        counts[index] = count
    return counts


def _leading(words: np.ndarray) -> np.ndarray:
    """The first 53 bits of uniform reals in [0, 1), float64: at most 2^-53 too small."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


class _Real:
    """A uniform real in [0, 1) of which as many bits are drawn as a comparison needs."""

    def __init__(self, word: int, stream: Keystream) -> None:
        self._word, self._bits, self._stream = word, 64, stream

    def is_below_exp(self, exponent: Fraction) -> bool:
        """Whether it is below exp(-exponent), for an exponent of 0 or above."""
        if exponent == 0:
            return True
        while True:
            low, high = exp_bounds(exponent, self._bits + 16)
            unit = Fraction(1, 1 << self._bits)
            if (self._word + 1) * unit <= low:
                return True
            if self._word * unit >= high:
                return False
            self._word = self._word << 64 | self._stream.bits(64)
            self._bits += 64


def exp_bounds(exponent: Fraction, bits: int) -> tuple[Fraction, Fraction]:
    """Rationals around exp(-exponent), for an exponent above 0, that differ by at most 2^-bits."""
    # The rounded exponent is off by less than a unit of its last digit, which exp passes on.
    before_point = max(len(str(math.floor(exponent))), 1)
    digits = math.ceil(bits * math.log10(2)) + before_point + 8
    with decimal.localcontext(prec=digits, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX):
        value = (-decimal.Decimal(exponent.numerator) / exponent.denominator).exp()
    middle = Fraction(value)
    error = Fraction(1, 1 << (bits + 2))
    return max(middle - error, Fraction(0)), middle + error


# The literal sampler


def _happens(exponent: Fraction, stream: Keystream) -> bool:
    """True with probability exp(-exponent), for an exponent of 0 or above."""
    while exponent > 1:
        if not _happens(Fraction(1), stream):
            return False
        exponent -= 1
    k = 1
    while stream.below(exponent.denominator * k) < exponent.numerator:
        k += 1
    return k % 2 == 1
