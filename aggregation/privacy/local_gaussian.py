# SPDX-License-Identifier: Apache-2.0
"""Local privacy: a client noises its own update, and trusts nobody with it.

Any two updates of one client lie at most Δ = 2C apart, and whoever sees an update knows whose it
is: neither sampling nor other clients add anything. Noise is that of the analytic Gaussian
mechanism, on the grid of `gaussian.py`.

*Source* see `analytic_gaussian.py`.
*Cost* as the discrete Gaussian's.
"""

from __future__ import annotations

import numpy as np

from aggregation.privacy.analytic_gaussian import analytic_multiplier
from aggregation.privacy.clipping import clip
from aggregation.privacy.gaussian import Noise, in_steps, noised_mean
from aggregation.vectors import shaped
from protocol.tensors import ParamSpec, Tensors


def local_multiplier(epsilon: float, delta: float) -> float:
    """z, of C, for one client's release: any two of its updates lie at most 2C apart."""
    return 2 * analytic_multiplier(epsilon, delta)


def privatised(update: Tensors, noise: Noise, *, seed: bytes) -> dict[str, np.ndarray]:
    """One update, clipped to `noise.clip` and noised.

    Args:
        update: float32 tensors.
        noise: of a multiplier z that `local_multiplier` or an accountant gives.
        seed: secret, of this release alone.

    Raises: PrivacyError.
    """
    spec = ParamSpec.of(update)
    steps = in_steps(spec, clip(update, noise.clip).delta, noise.step)
    return shaped(spec, noised_mean(steps, noise, expected=1.0, seed=seed, use="local update"))
