# SPDX-License-Identifier: Apache-2.0
"""The accountant beside dp_accounting's own accountants, called as its documentation says."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from aggregation.privacy.accountant import PoissonRound, quiet, spent
from simulations.benchmarks.figure import Figure, figure
from simulations.progress import ProgressListener

# q, z, rounds, delta; the first five are those whose values docs and tests quote.
SETTINGS: Final = (
    (0.01, 1.0, 1000, 1e-5), (0.1, 1.0, 100, 1e-5), (0.05, 0.7, 200, 1e-5), (1.0, 5.0, 50, 1e-5),
    (0.001, 1.0, 2000, 1e-6), (0.02, 1.1, 300, 1e-6), (0.1, 0.9, 20, 1e-5), (0.3, 1.5, 60, 1e-5),
    (0.5, 3.0, 40, 1e-4), (0.005, 1.5, 100, 1e-7), (0.1, 2.0, 10, 1e-5), (0.25, 1.3, 1, 1e-5),
    (1.0, 1.0, 1, 1e-5), (1.0, 20.0, 500, 1e-6), (0.9, 4.0, 30, 1e-5), (0.01, 2.0, 50, 1e-5),
    (0.2, 1.4, 15, 1e-6), (0.1, 5.0, 200, 1e-5), (0.03, 1.2, 150, 1e-5), (0.7, 6.0, 100, 1e-5),
)  # fmt: skip
RDP_PART: Final = 0.005


def epsilon_error(progress: ProgressListener) -> Figure:
    """`epsilon_error`: how far the reported epsilon is below dp_accounting's, at most; it holds
    only where Rényi accounting agrees to half a percent, too."""
    import dp_accounting
    from dp_accounting import pld, rdp

    progress.stage(f"privacy: {len(SETTINGS)} settings accounted for twice")
    below, above, apart = -float("inf"), 0.0, 0.0
    for rate, multiplier, rounds, delta in SETTINGS:
        event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(multiplier))
        theirs = pld.PLDAccountant().compose(event, rounds).get_epsilon(delta)
        with quiet():
            renyi = rdp.RdpAccountant().compose(event, rounds).get_epsilon(delta)
        found = spent(((PoissonRound(rate=rate, multiplier=multiplier), rounds),), delta)
        below, above = max(below, theirs - found.epsilon), max(above, found.epsilon - theirs)
        apart = max(apart, abs(found.rdp / renyi - 1))
    made = figure(
        "epsilon_error",
        below,
        target="<= 1e-3",
        note=f"{len(SETTINGS)} settings; above by {above:.1e} at most; Rényi accounting apart by "
        f"{100 * apart:.2g} %, at most {100 * RDP_PART:g}",
    )
    return made if apart <= RDP_PART else replace(made, holds=False)
