# SPDX-License-Identifier: Apache-2.0
"""What a client says of its samples before a round: how many, or no more than that they are enough.

A coordinator that sees sums alone is not told by the way who holds how much.
"""

from __future__ import annotations

from protocol.manifest import Manifest
from protocol.readiness import Readiness


def readiness(manifest: Manifest, samples: int, held_out: int) -> Readiness:
    """Of a client with so many samples to train and to test on."""
    fewest = manifest.fewest_samples
    if fewest is None:
        return Readiness(samples=samples, held_out=held_out)
    if samples < fewest:
        return Readiness(ready=False, reason="it has fewer samples than rounds.min_samples")
    return Readiness()
