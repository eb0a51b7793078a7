# SPDX-License-Identifier: Apache-2.0
"""The exact privacy curve of the Gaussian mechanism: δ at ε, ε at δ, and the noise for both.

    δ(ε) = Φ(Δ/2σ - εσ/Δ) - e^ε·Φ(-Δ/2σ - εσ/Δ)

with Φ the normal distribution function, σ the noise and Δ the sensitivity; below, σ/Δ is called the
multiplier.

*Source* Balle, Wang, "Improving the Gaussian Mechanism for Differential Privacy: Analytical
Calibration and Optimal Denoising", ICML 2018 (arXiv 1805.06530), theorem 8: exact for every ε,
where the textbook's σ = Δ·√(2·ln(1.25/δ))/ε holds for ε below 1 alone, and is larger there.
*Cost* some hundred values of Φ.
"""

from __future__ import annotations

import math
from typing import Final

from aggregation.errors import PrivacyError

_HALVINGS: Final = 60
_TAIL: Final = -30.0  # below, erfc is computed from its asymptotic series


def analytic_multiplier(epsilon: float, delta: float) -> float:
    """σ/Δ for one release, rounded up by less than 10⁻¹⁵ of itself.

    Raises: PrivacyError unless epsilon is finite and above 0, and delta lies between 0 and 1.
    """
    _require(epsilon, delta)
    low, high = 0.0, 1.0
    while gaussian_delta(high, epsilon) > delta:
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if middle > 0 and gaussian_delta(middle, epsilon) <= delta:
            high = middle
        else:
            low = middle
    return high


def gaussian_delta(multiplier: float, epsilon: float) -> float:
    """δ at ε of one Gaussian release whose noise is `multiplier` times its sensitivity."""
    above = 0.5 / multiplier - epsilon * multiplier
    below = -0.5 / multiplier - epsilon * multiplier
    first, second = _log_phi(above), epsilon + _log_phi(below)
    return math.exp(first) * -math.expm1(second - first) if second < first else 0.0


def gaussian_epsilon(multiplier: float, delta: float) -> float:
    """The inverse of `gaussian_delta`: ε at δ, exact to about 10⁻¹² and rounded up."""
    if gaussian_delta(multiplier, 0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while gaussian_delta(multiplier, high) > delta:
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if gaussian_delta(multiplier, middle) <= delta else (middle, high)
    return high


def _require(epsilon: float, delta: float) -> None:
    if not 0 < epsilon < math.inf:
        raise PrivacyError(f"epsilon: expected a finite number above 0, found {epsilon!r}")
    if not 0 < delta < 1:
        raise PrivacyError(f"delta: expected a number between 0 and 1, found {delta!r}")


def _log_phi(x: float) -> float:
    """ln Φ(x)."""
    if x > _TAIL:
        return math.log(0.5 * math.erfc(-x / math.sqrt(2)))
    inverse = 1 / (x * x)
    series = 1 - inverse * (1 - 3 * inverse * (1 - 5 * inverse))
    return -x * x / 2 - math.log(-x * math.sqrt(2 * math.pi)) + math.log(series)
