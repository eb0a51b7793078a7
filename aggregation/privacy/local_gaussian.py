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


def privatised(
    delta_of: Tensors, bound: float, *, epsilon: float, delta: float, seed: bytes
) -> dict[str, np.ndarray]:
    """One update, clipped to `bound` and noised: (epsilon, delta)-private by itself.

    Args:
        delta_of: float32 tensors.
        bound: C.
        seed: secret, of this release alone.

    Raises: PrivacyError.
    """
    noise = Noise(clip=bound, multiplier=local_multiplier(epsilon, delta))
    spec = ParamSpec.of(delta_of)
    steps = in_steps(spec, clip(delta_of, bound).delta, noise.step)
    return shaped(spec, noised_mean(steps, noise, expected=1.0, seed=seed, use="local update"))
