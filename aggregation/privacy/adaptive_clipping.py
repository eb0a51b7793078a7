# SPDX-License-Identifier: Apache-2.0
"""A clipping norm that finds a quantile of clients' norms by itself, and privately.

    b_i = 1 where ‖Δ_i‖ ≤ C, else 0;   b̃ = ½ + (Σ(b_i - ½) + N(0, σ_b²))/m
    C ← C·exp(-η_C·(b̃ - γ))
    z_Δ = (z⁻² - (2σ_b)⁻²)^(-1/2), the noise multiplier that is left for the updates

Where few updates are shorter than C, b̃ is below γ and C grows. The round's own C scales the
round's noise; the new one holds from the next round on.

*Source* Andrew, Thakkar, McMahan, Ramaswamy, "Differentially Private Learning with Adaptive
Clipping", NeurIPS 2021 (arXiv 1905.03871), algorithm 1 and its theorem on splitting the noise;
γ = 0.5, η_C = 0.2, σ_b = m/20 and C₀ = 0.1 are its defaults.
*What the split rests on* A client moves Σ(b_i - ½) by ½, and Σb_i by 1: only the first goes with
(2σ_b)⁻². Beside Σ Δ_i/C, which it moves by 1, one release of both is one Gaussian of multiplier z.
A client that should have taken part and did not counts as ½, towards neither side. Where a client
is replaced both move twice as far, and are one Gaussian of z/2.
*Cost* none to speak of.
"""

from __future__ import annotations

import math
from typing import Final

from aggregation.errors import PrivacyError
from aggregation.privacy.clipping import require_bound

RATE: Final = 0.2  # η_C
_COUNT_NOISE_SHARE: Final = 1 / 20  # of m

# A norm beyond these is no norm of float32 updates, and would end as 0 or infinity.
_SHORTEST: Final = 1e-12
_LONGEST: Final = 1e12


def default_count_noise(expected: float) -> float:
    """σ_b for rounds of `expected` clients (m)."""
    return expected * _COUNT_NOISE_SHARE


def update_multiplier(multiplier: float, count_noise: float) -> float:
    """z_Δ, so that updates and count together cost what one release of multiplier z costs.

    Raises: PrivacyError unless 0 < z < 2σ_b: the count alone would cost more than that.
    """
    if not (0 < multiplier < 2 * count_noise and math.isfinite(count_noise)):
        raise PrivacyError(
            f"noise multiplier {multiplier:g}: expected it above 0 and below {2 * count_noise:g}, "
            f"twice the noise of the count of unclipped updates ({count_noise:g}); have more "
            "clients in a round, or a fixed clipping norm"
        )
    return float((multiplier**-2.0 - (2 * count_noise) ** -2.0) ** -0.5)


def noised_share(unclipped: int, answered: int, noise: float, *, expected: float) -> float:
    """b̃: the share of updates that were not clipped, with noise; it may lie outside 0 to 1.

    Args:
        unclipped: updates that were not clipped, of the `answered` that came.
        noise: one draw of N(0, σ_b²).
        expected: m, fixed before the round.
    """
    if not 0 <= unclipped <= answered:
        raise PrivacyError(f"unclipped: expected 0 to {answered}, found {unclipped}")
    return 0.5 + (unclipped - 0.5 * answered + noise) / expected


def next_bound(bound: float, share: float, *, quantile: float, rate: float = RATE) -> float:
    """C of the next round.

    Args:
        bound: C of this round.
        share: b̃, as `noised_share` gives it.
        quantile: γ, the share of updates that C should leave as they are, between 0 and 1.
        rate: η_C.

    Raises: PrivacyError for a quantile outside (0, 1), a rate of 0 or below, or a share that is not
        finite.
    """
    require_bound(bound)
    if not 0 < quantile < 1:
        raise PrivacyError(f"quantile: expected a share between 0 and 1, found {quantile:g}")
    if not (0 < rate < math.inf and math.isfinite(share)):
        raise PrivacyError(f"expected a rate above 0 and a finite share, found {rate}, {share}")
    # The count's noise has no bound, and exp of it may have none either.
    exponent = min(max(-rate * (share - quantile), -50.0), 50.0)
    return min(max(bound * math.exp(exponent), _SHORTEST), _LONGEST)
