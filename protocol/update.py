# SPDX-License-Identifier: Apache-2.0
"""A client's answer to a plan: a header that says what it is, and a codec's bytes.

Magic `FLUP`; the form is that of container.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from protocol import _checks
from protocol.container import FIXED_BYTES, Blob, pack, require_canonical, unpack
from protocol.errors import MalformedError, NotFiniteError, WeightError
from protocol.limits import (
    MAX_CLIENT_LENGTH,
    MAX_CODEC_LENGTH,
    MAX_HEADER_BYTES,
    MAX_METRICS,
    MAX_NONCE_LENGTH,
    MAX_ROUND,
    MAX_SAMPLES,
    MIN_NONCE_LENGTH,
)

UPDATE_MAGIC: Final = b"FLUP"
MAX_UPDATE_OVERHEAD: Final = FIXED_BYTES + MAX_HEADER_BYTES
"""What an update may be longer than its payload: add it to a payload budget."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateHeader:
    """`samples` is the weight that the client claims; `metrics` are finite numbers by name."""

    job: str  # SHA-256 of the job, 64 hex digits
    round: int
    nonce: str  # hex; one attempt of one round, copied from the plan
    client: str
    codec: str
    samples: int  # at least 1
    metrics: Mapping[str, float]

    def __post_init__(self) -> None:
        error = MalformedError
        _checks.hexadecimal("job", self.job, 64, 64, error)
        object.__setattr__(self, "round", _checks.integer("round", self.round, 0, MAX_ROUND, error))
        _checks.hexadecimal("nonce", self.nonce, MIN_NONCE_LENGTH, MAX_NONCE_LENGTH, error)
        _checks.text("client", self.client, MAX_CLIENT_LENGTH, error)
        _checks.text("codec", self.codec, MAX_CODEC_LENGTH, error)
        object.__setattr__(
            self, "samples", _checks.integer("samples", self.samples, 1, MAX_SAMPLES, WeightError)
        )
        object.__setattr__(self, "metrics", _metrics(self.metrics))


def pack_update(header: UpdateHeader, payload: Blob) -> bytes:
    """The bytes that travel."""
    return pack(UPDATE_MAGIC, _to_json(header), payload)


def unpack_update(blob: Blob, *, max_bytes: int) -> tuple[UpdateHeader, memoryview]:
    """Header and payload; the payload is a read-only view of `blob`.

    Raises: ContainerError; its `.code` is the RejectionCode.
    """
    value, text, payload = unpack(UPDATE_MAGIC, blob, max_bytes=max_bytes)
    fields = _checks.keys("header", value, _FIELDS, MalformedError)
    header = UpdateHeader(**fields)
    require_canonical(_to_json(header), text)
    return header, payload


_FIELDS: Final = ("job", "round", "nonce", "client", "codec", "samples", "metrics")


def _to_json(header: UpdateHeader) -> dict[str, object]:
    return {
        "job": header.job,
        "round": header.round,
        "nonce": header.nonce,
        "client": header.client,
        "codec": header.codec,
        "samples": header.samples,
        "metrics": dict(header.metrics),
    }


def _metrics(metrics: object) -> dict[str, float]:
    if not isinstance(metrics, Mapping):
        raise MalformedError(f"metrics: expected an object, found {_checks.shown(metrics)}")
    if len(metrics) > MAX_METRICS:
        raise MalformedError(f"metrics: expected at most {MAX_METRICS}, found {len(metrics)}")
    checked: dict[str, float] = {}
    for name, value in metrics.items():
        _checks.text("metric name", name, MAX_CLIENT_LENGTH, MalformedError)
        checked[name] = _checks.real(
            f"metric {name}", value, MalformedError, not_finite=NotFiniteError
        )
    return checked
