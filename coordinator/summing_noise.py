# SPDX-License-Identifier: Apache-2.0
"""Noise that clients add in shares inside a secure sum: how much, and whether that is enough."""

from __future__ import annotations

from fractions import Fraction

from aggregation.codecs import SumCodec, codec_named
from aggregation.codecs.common_grid import sum_bits
from aggregation.errors import PrivacyError
from aggregation.packing import MAX_BITS
from aggregation.privacy.distributed_gaussian import noise_reach, share_variance, sum_sensitivity
from coordinator.errors import Fault
from coordinator.job import Job
from coordinator.privacy import Privacy
from protocol.tensors import ParamSpec


def share_of(privacy: Privacy | None, codec: SumCodec, shared: ParamSpec) -> Fraction | None:
    """The variance of each client's noise in a sum, in steps²; None where clients add none.

    Raises: PrivacyError for noise of less than a few steps.
    """
    if privacy is None or privacy.section.mode != "distributed":
        return None
    return share_variance(privacy.share, privacy.section.clip, codec.step(shared))


def noise_faults(job: Job, privacy: Privacy | None, shared: ParamSpec) -> list[Fault]:
    """What in a job with such noise does not hold for the tensors that clients send."""
    codec = codec_named(job.update.codec)
    if privacy is None or privacy.section.mode != "distributed" or not isinstance(codec, SumCodec):
        return []
    clip = privacy.section.clip
    needed = sum_sensitivity(codec.reach(shared), codec.step(shared), codec.length(shared))
    if needed > clip:
        words = (
            f'expected at least {needed:.6g} with codec "{codec.name}": what it makes of an update '
            "of its norm may move a sum as far as that"
        )
        return [Fault(key="privacy.clip", value=clip, allowed=words)]
    try:
        variance = share_of(privacy, codec, shared)
    except PrivacyError as error:
        return [Fault(key="update.codec", value=codec.name, allowed=str(error))]
    assert variance is not None
    bits = sum_bits(codec.levels, privacy.drawn, noise=noise_reach(variance, privacy.drawn))
    if bits > MAX_BITS:
        words = (
            f"expected fewer bits a value: with this noise the sum of {privacy.drawn} clients "
            f"needs {bits} bits, and there are {MAX_BITS}"
        )
        return [Fault(key="update.codec", value=codec.name, allowed=words)]
    return []
