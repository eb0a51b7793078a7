# SPDX-License-Identifier: Apache-2.0
"""Between what a client sent and what is merged: everything is checked, nothing raises.

A client is not trusted: its answer must fit the plan that it was sent, to the byte and to the
nonce, and hold finite values. What does not is a `Rejection`, and the round goes on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aggregation.codecs import NO_SEEDS, Seeds, codec_named
from aggregation.errors import CodecError
from protocol.errors import ContainerError
from protocol.rejection import Rejection, RejectionCode
from protocol.tensors import ParamSpec
from protocol.update import UpdateHeader, unpack_update


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What the answer to one plan must be."""

    job: str
    round: int
    nonce: str
    client: str
    codec: str
    spec: ParamSpec | None
    """Of the tensors; None for an answer without any (evaluation)."""
    max_bytes: int
    max_samples: int
    seeds: Seeds = NO_SEEDS
    """Of the round, as far as decoding needs them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """An answer that may be merged."""

    header: UpdateHeader
    delta: dict[str, np.ndarray]


def admit(blob: bytes, *, expected: Expected) -> Admitted | Rejection:
    """Check one answer. Never raises for what a client sent.

    Cost: linear in the blob; decoding takes at most the spec's bytes.
    """

    def reject(code: RejectionCode, reason: str) -> Rejection:
        return Rejection(client=expected.client, round=expected.round, code=code, reason=reason)

    try:
        header, payload = unpack_update(blob, max_bytes=expected.max_bytes)
    except ContainerError as error:
        return reject(error.code, str(error))
    for code, name, found, wanted in (
        (RejectionCode.WRONG_JOB, "job", header.job, expected.job),
        (RejectionCode.WRONG_ROUND, "round", header.round, expected.round),
        (RejectionCode.WRONG_CLIENT, "client", header.client, expected.client),
        (RejectionCode.WRONG_NONCE, "nonce", header.nonce, expected.nonce),
        (RejectionCode.WRONG_CODEC, "codec", header.codec, expected.codec),
    ):
        if found != wanted:
            return reject(code, f"update: expected {name} {wanted}, found {found}")
    if header.samples > expected.max_samples:
        allowed = f"expected at most {expected.max_samples} samples, found {header.samples}"
        return reject(RejectionCode.BAD_WEIGHT, f"update: {allowed}")
    if expected.spec is None:
        if len(payload):
            reason = f"answer: expected no tensors, found {len(payload)} bytes of them"
            return reject(RejectionCode.TOO_LONG, reason)
        return Admitted(header=header, delta={})
    try:
        # Decoding refuses whatever is not finite.
        codec = codec_named(expected.codec)
        delta = codec.decode(payload, expected.spec, expected.spec.nbytes, seeds=expected.seeds)
    except CodecError as error:
        return reject(error.code, str(error))
    return Admitted(header=header, delta=delta)
