# SPDX-License-Identifier: Apache-2.0
"""The protocol that every codec follows, and the checks that all of them share."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from aggregation.errors import (
    PayloadNotFiniteError,
    PayloadTooLongError,
    PayloadTruncatedError,
    SpecMismatchError,
)
from protocol.errors import SpecError
from protocol.tensors import ParamSpec, Tensors

_PART: Final = 1 << 20

Payload = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class Seeds:
    """Where a codec's random choices come from; both sides know them before anything is sent.

    `own` belongs to one client and round, so that the rounding errors of many clients cancel.
    `shared` belongs to the round: choices that every client must make alike.
    """

    own: int = 0
    shared: int = 0


NO_SEEDS: Final = Seeds()


def round_seeds(job: str, round: int, *, client_seed: int = 0) -> Seeds:
    """The seeds of one round of a job, and of the client whose plan holds `client_seed`."""

    def seed(*parts: object) -> int:
        digest = hashlib.sha256("/".join(map(str, ("codec", *parts))).encode()).digest()
        return int.from_bytes(digest[:8], "little")

    return Seeds(own=seed(client_seed), shared=seed(job, round))


class Codec(Protocol):
    """Named float32 tensors to bytes and back.

    A payload holds values only: both sides know the ParamSpec, tensors follow one another in the
    order of their names, numbers are little-endian. Codecs are pure and keep no state: what is
    random follows from the seeds alone.
    """

    @property
    def name(self) -> str:
        """As job files, plans and updates call it, settings included: "top-k:0.05"."""
        ...

    def encode(self, tensors: Tensors, *, seeds: Seeds = NO_SEEDS) -> bytes:
        """Raises: CodecError for tensors that are not float32 or not finite."""
        ...

    def decode(
        self, payload: Payload, spec: ParamSpec, limit: int, *, seeds: Seeds = NO_SEEDS
    ) -> dict[str, np.ndarray]:
        """New writable float32 tensors that fit `spec`, every value finite.

        `limit` is the most bytes that the decoded tensors may take in memory; decoding itself takes
        at most 16 MiB beside them and the payload. Raises: CodecError for any payload that `encode`
        could not have written. Cost: linear in payload and spec.
        """
        ...

    def payload_bytes(self, spec: ParamSpec) -> int:
        """The most bytes that `encode` gives for tensors of this spec."""
        ...


def float32_spec(tensors: Tensors) -> ParamSpec:
    """The spec of tensors about to be encoded. Raises: CodecError."""
    try:
        spec = ParamSpec.of(tensors)
    except SpecError as error:
        raise SpecMismatchError(str(error)) from None
    require_float32(spec)
    return spec


def require_float32(spec: ParamSpec) -> None:
    """Codecs carry float32 only, so that what arrives has the type of what was sent."""
    for name, entry in spec.entries:
        if entry.dtype != "float32":
            raise SpecMismatchError(
                f'tensor "{name}" is {entry}; codecs carry float32, convert it first'
            )


def require_memory(spec: ParamSpec, limit: int) -> None:
    """Raises: CodecError if tensors of this spec take more than `limit` bytes."""
    if spec.nbytes > limit:
        raise PayloadTooLongError(
            f"expected tensors of at most {limit} bytes in memory, the spec's take {spec.nbytes}"
        )


def require_length(payload: memoryview, expected: int) -> None:
    """Raises: CodecError unless the payload has exactly the expected bytes."""
    if len(payload) < expected:
        raise PayloadTruncatedError(f"payload: expected {expected} bytes, found {len(payload)}")
    if len(payload) > expected:
        raise PayloadTooLongError(f"payload: expected {expected} bytes, found {len(payload)}")


def require_finite(values: np.ndarray, spec: ParamSpec) -> None:
    """Raises: CodecError naming the first tensor of a flat vector that is not finite."""
    # In parts: one boolean a value of a large update would be megabytes beside it.
    parts = (values[start : start + _PART] for start in range(0, values.size, _PART))
    if all(np.isfinite(part).all() for part in parts):
        return
    for name, tensor in split(values, spec).items():
        if not np.isfinite(tensor).all():
            raise PayloadNotFiniteError(
                f'tensor "{name}": expected finite values, found {count_not_finite(tensor)} '
                "NaN or infinite ones"
            )


def count_not_finite(values: np.ndarray) -> int:
    """Number of NaN and infinite values."""
    return values.size - int(np.count_nonzero(np.isfinite(values)))


def split(values: np.ndarray, spec: ParamSpec) -> dict[str, np.ndarray]:
    """A flat vector in name order as named views."""
    tensors: dict[str, np.ndarray] = {}
    start = 0
    for name, entry in spec.entries:
        tensors[name] = values[start : start + entry.size].reshape(entry.shape)
        start += entry.size
    return tensors
