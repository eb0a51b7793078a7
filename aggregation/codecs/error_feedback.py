# SPDX-License-Identifier: Apache-2.0
"""What a payload did not carry is added to the next one.

*Source* Seide et al., "1-Bit Stochastic Gradient Descent and its Application to Data-Parallel
Distributed Training of Speech DNNs", Interspeech 2014; Karimireddy et al., "Error Feedback Fixes
SignSGD and other Gradient Compression Schemes", ICML 2019 (arXiv 1901.09847):
p ← δ + e, send C(p), e ← p - C(p).

Over any number of rounds with `decay` 1, all that was decoded and the last residual add up to all
deltas, to float32 rounding. A client that is seldom chosen carries an old residual; a `decay` below
1 lets it fade, and the sum no longer holds. The residual belongs to one client and one job, and to
rounds whose payload arrived: keep the old one until the update is acknowledged.

*Cost* one encoding and one decoding; up to about 30 bytes a value beside what these take.
"""

from __future__ import annotations

import numpy as np

from aggregation.codecs.codec import Codec, Seeds, float32_spec, require_finite, split
from aggregation.errors import CodecError, SpecMismatchError
from protocol.tensors import ParamSpec, Tensors


def encode_with_feedback(
    codec: Codec,
    delta: Tensors,
    residual: Tensors | None,
    *,
    seeds: Seeds,
    decay: float = 1.0,
) -> tuple[bytes, dict[str, np.ndarray]]:
    """The payload of delta + decay · residual, and the new residual: float32 tensors as `delta`'s.

    `residual`: what the last call gave; None or empty in the first round. `decay`: from 0 to 1.
    Raises: CodecError for tensors that are not float32, do not fit one another or are not finite,
    and for what the codec refuses; nothing is lost then, both arguments still stand.
    """
    share = _checked_decay(decay)
    spec = float32_spec(delta)
    wanted = _finite(spec, spec.flatten(delta))
    if residual:
        if problem := spec.mismatch(residual):
            raise SpecMismatchError(f"residual: {problem}")
        old = _finite(spec, spec.flatten(residual)).astype(np.float64)
        wanted = _finite(spec, wanted + share * old)
    payload = codec.encode(split(wanted, spec), seeds=seeds)
    carried = spec.flatten(codec.decode(payload, spec, spec.nbytes, seeds=seeds))
    left = _finite(spec, wanted.astype(np.float64) - carried)
    return payload, split(left, spec)


def _checked_decay(decay: object) -> float:
    if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay <= 1:
        raise CodecError(f"decay: expected a number from 0 to 1, found {decay!r}")
    return float(decay)


def _finite(spec: ParamSpec, vector: np.ndarray) -> np.ndarray:
    """As float32. Raises: CodecError naming the tensor if that is not finite."""
    with np.errstate(over="ignore"):  # refused by name, just below
        rounded = vector.astype(np.float32)
    require_finite(rounded, spec)
    return rounded
