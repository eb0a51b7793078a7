# SPDX-License-Identifier: Apache-2.0
"""What an update weighs in a secure sum, and the update times that, as it is summed.

By samples: the update is cut to the codec's norm first, so that no more of it is summed than its
weight times that norm, whatever training came to. What error feedback adds comes after that, with
the weight that it had, and the codec cuts both together to its norm. By distance from a centre (see
`aggregation.robust.masked_geometric_median`): the difference times its weight is no longer than the
plan's smoothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from aggregation.codecs import Grid, codec_named
from aggregation.privacy.clipping import clip
from aggregation.robust.masked_geometric_median import client_term
from aggregation.summed_weights import FULL, weight_of_samples, weight_of_share
from aggregation.vectors import flat, shaped
from client_sdk.errors import PlanError
from client_sdk.work import Work
from protocol.tensors import ParamSpec, Tensors


def weighed(work: Work, delta: Tensors, samples: int) -> tuple[Mapping[str, np.ndarray], int]:
    """What is summed of an update, and its weight as `aggregation.summed_weights` has it; the
    update as it is, and 0, where the plan asks for no weights.

    Raises: PlanError for a codec that does not keep lengths, or a centre of other tensors;
        PrivacyError or MergeError for an update that has no length.
    """
    plan = work.plan
    if not plan.full_weight_samples and not plan.smoothing:
        return delta, 0
    codec = codec_named(plan.uplink_codec)
    if not isinstance(codec, Grid):
        raise PlanError(
            f'plan: expected a codec "grid:BITS,NORM" for updates with weights, found {codec.name}'
        )
    if plan.smoothing:
        return _around_centre(work, delta)
    weight = weight_of_samples(samples, plan.full_weight_samples)
    share = np.float32(weight / FULL)
    return {name: value * share for name, value in clip(delta, codec.norm).delta.items()}, weight


def _around_centre(work: Work, delta: Tensors) -> tuple[Mapping[str, np.ndarray], int]:
    spec = ParamSpec.of(delta)
    sent = {name: value for name, value in work.centre.items() if name in delta}
    if problem := spec.mismatch(sent):
        raise PlanError(f"plan: expected a centre like the update: {problem}")
    update, centre = flat(spec, delta), flat(spec, sent)
    term = client_term(centre, update, smoothing=work.plan.smoothing)
    weight = weight_of_share(term.weight)
    return shaped(spec, (update - centre) * (weight / FULL)), weight
