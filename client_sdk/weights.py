# SPDX-License-Identifier: Apache-2.0
"""What an update weighs in a secure sum, and the update times that, as it is summed.

The cut to the codec's norm comes first: a client's share of the sum is then never longer than its
weight times that norm, whatever its training came to.
"""

from __future__ import annotations

import numpy as np

from aggregation.codecs import Grid, codec_named
from aggregation.privacy.clipping import clip
from aggregation.summed_weights import FULL, weight_of_samples
from client_sdk.errors import PlanError
from protocol.plan import Plan
from protocol.tensors import Tensors


def weighed(plan: Plan, delta: Tensors, samples: int) -> tuple[Tensors, int]:
    """The update as it is summed, and its weight as `aggregation.summed_weights` has it; the update
    as it is, and 0, where the plan asks for no weights.

    Raises: PlanError for a codec that does not keep lengths; PrivacyError for an update that cannot
        be cut.
    """
    if not plan.full_weight_samples:
        return delta, 0
    codec = codec_named(plan.uplink_codec)
    if not isinstance(codec, Grid):
        raise PlanError(
            f'plan: expected a codec "grid:BITS,NORM" for updates with weights, found {codec.name}'
        )
    weight = weight_of_samples(samples, plan.full_weight_samples)
    share = np.float32(weight / FULL)
    return {name: value * share for name, value in clip(delta, codec.norm).delta.items()}, weight
