# SPDX-License-Identifier: Apache-2.0
"""Noise that clients add in shares, so that nobody sees a sum without it.

Under secure aggregation the server learns Σ(x_i + n_i) modulo R, with x_i the clipped update in
steps of a grid and n_i a discrete Gaussian of variance (zC/g)²/m_min. m_min is the fewest survivors
with which a round goes on: with more of them there is more noise than was accounted for, and never
less. Clients that tell the server their shares take them away, so that those that may do so are
budgeted beside m_min. The sum is one of m·2ᵇ and of noise: the modulus has room for twelve of its
deviations on either side.

*Source* Kairouz, Liu, Steinke, "The Distributed Discrete Gaussian Mechanism for Federated Learning
with Secure Aggregation", ICML 2021 (arXiv 2102.06387). A sum of discrete Gaussians is not one, but
its log-probabilities differ from one's by at most
τ = 10·Σ_{k=1}^{n-1} exp(-2π²s²·k/(k+1)) for shares of variance s² ≥ 1/4, and n·d values together
have ε² = min(1/z² + τd/2, (1/z + τ√d)²) of concentrated privacy ½ε². The tests hold τ against
exact convolutions.

*What follows* With shares of a few steps τ is below any rounding: s = 4 gives 10⁻⁶⁷. Shares
below that are refused, rather than accounted for: the grid is to be finer.
*Cost* as the discrete Gaussian's.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Final

from aggregation.errors import PrivacyError
from aggregation.privacy.clipping import require_bound

LEAST_SHARE: Final = Fraction(16)  # variance in steps
_TAIL: Final = 12  # deviations that the noise of a sum is given room for


def share_multiplier(multiplier: float, *, fewest: int, colluding: int = 0) -> float:
    """The noise of each client, in clipping norms, with which that of all who may be counted on is
    `multiplier` or more.

    Args:
        multiplier: z, of the round's whole noise, as it is accounted for.
        fewest: m_min, survivors without which a round is given up.
        colluding: survivors that may tell their noise.

    Raises: PrivacyError where nobody's noise would be left.
    """
    if not 0 < multiplier < math.inf:
        raise PrivacyError(f"noise multiplier: expected a number above 0, found {multiplier!r}")
    honest = fewest - colluding
    if colluding < 0 or honest < 1:
        raise PrivacyError(
            f"expected more survivors than may collude, found {fewest} and {colluding}"
        )
    share = multiplier / math.sqrt(honest)
    # Squares of floats may fall short by a last place; the noise must not.
    while Fraction(share) ** 2 * honest < Fraction(multiplier) ** 2:
        share = math.nextafter(share, math.inf)
    return share


def share_variance(share: float, clip: float, step: float) -> Fraction:
    """The variance of one client's noise, in steps².

    Args:
        share: as `share_multiplier` gives it.
        clip: C.
        step: g, of the grid, in the units of C.

    Raises: PrivacyError for shares that are too coarse.
    """
    require_bound(clip)
    require_bound(step)
    if not 0 < share < math.inf:
        raise PrivacyError(f"share of noise: expected a number above 0, found {share!r}")
    variance = (Fraction(share) * Fraction(clip) / Fraction(step)) ** 2
    if variance < LEAST_SHARE:
        raise PrivacyError(
            f"grid: expected shares of noise of {math.sqrt(LEAST_SHARE):g} steps or more, found "
            f"{math.sqrt(variance):.3g} steps; use more bits a value"
        )
    return variance


def sum_sensitivity(reach: float, step: float, size: int) -> float:
    """How far one client can move a sum, against the integers next to no change in its place.

    Args:
        reach: largest norm of what a client's integers stand for.
        step: g, in the same units. No change lies between two integers: half a step a value.
        size: d, values of an update.
    """
    return reach + step * math.sqrt(size) / 2


def noise_reach(variance: Fraction, clients: int) -> int:
    """What the noise of so many shares is taken to stay below, in steps: beyond lies one value in
    10³². A sum that goes further is wrong by a whole modulus, and no less private."""
    return math.isqrt(math.ceil(_TAIL**2 * variance * clients)) + 1


def summed_multiplier(share: Fraction, survivors: int, clip: float, step: float) -> float:
    """z of the noise that so many shares add up to: C-long updates, in the same units."""
    return float(Fraction(step) / Fraction(clip)) * math.sqrt(share * survivors)


def sum_divergence(share: Fraction, count: int) -> float:
    """τ: how far log-probabilities of a sum of `count` samples may be from one discrete Gaussian's.

    `share` is the variance of each, at least 1/4.
    """
    if share < Fraction(1, 4):
        raise PrivacyError(f"expected shares of variance 1/4 or more, found {float(share):g}")
    if count < 2:
        return 0.0
    # The terms fall; those after the first hundred are each at most the hundredth.
    terms = [
        math.exp(-2 * math.pi**2 * float(share) * k / (k + 1)) for k in range(1, min(count, 100))
    ]
    return 10 * (math.fsum(terms) + max(count - 100, 0) * terms[-1])


def accounted_multiplier(multiplier: float, divergence: float, size: int) -> float:
    """The z to account a sum of discrete Gaussians by: `multiplier` less what τ costs.

    Args:
        multiplier: z of the sum's variance.
        divergence: τ, as `sum_divergence` gives it.
        size: d, values of an update.
    """
    plain = 1 / multiplier
    return 1 / min(
        math.sqrt(plain**2 + divergence * size / 2), plain + divergence * math.sqrt(size)
    )
