# SPDX-License-Identifier: Apache-2.0
"""How a message of a secure sum reaches a device: of which job and round, and who its peers are.

The message itself is that of `aggregation.secure_aggregation.messages`; it is not looked at here.
Magic `FLSS`; the form is that of container.py. The payload is the credentials as canonical JSON,
of the length that the header says, and then the message. An answer is a message as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from protocol import _checks, _json
from protocol.container import Blob, pack, require_canonical, unpack
from protocol.errors import MalformedError
from protocol.limits import MAX_CLIENT_LENGTH, MAX_ROUND
from protocol.plan import Plan, plan_fields
from protocol.tensors import Tensors

SUM_MAGIC: Final = b"FLSS"
MAX_PEERS: Final = 1 << 16
MAX_SUM_REQUEST_BYTES: Final = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class SumRequest:
    """A message of a secure sum to one client."""

    job: str  # SHA-256 of the job, 64 hex digits
    round: int
    client: str
    credentials: Mapping[str, str] = field(default_factory=dict)
    """By the participants' names, what shows who they are (PEM); with an announcement alone."""
    message: bytes

    def __post_init__(self) -> None:
        error = MalformedError
        _checks.hexadecimal("job", self.job, 64, 64, error)
        object.__setattr__(self, "round", _checks.integer("round", self.round, 0, MAX_ROUND, error))
        _checks.text("client", self.client, MAX_CLIENT_LENGTH, error)
        if len(self.credentials) > MAX_PEERS:
            raise error(f"credentials: expected at most {MAX_PEERS}, found {len(self.credentials)}")
        for name, credential in self.credentials.items():
            _checks.text("credentials", name, MAX_CLIENT_LENGTH, error)
            _checks.pem("credentials", credential, "CERTIFICATE", "PUBLIC KEY", error=error)


def pack_sum_request(request: SumRequest) -> bytes:
    """The bytes that travel."""
    credentials = _json.canonical(dict(request.credentials))
    return pack(SUM_MAGIC, _header(request, len(credentials)), credentials + request.message)


def unpack_sum_request(blob: Blob) -> SumRequest:
    """Raises: ContainerError."""
    value, text, payload = unpack(SUM_MAGIC, blob, max_bytes=MAX_SUM_REQUEST_BYTES)
    names = ("job", "round", "client", "credentials_bytes")
    fields = _checks.keys("header", value, names, MalformedError)
    size = _checks.integer(
        "credentials_bytes", fields.pop("credentials_bytes"), 0, len(payload), MalformedError
    )
    try:
        credentials = _json.parse(bytes(payload[:size]))
    except ValueError as error:
        raise MalformedError(f"credentials: {error}") from None
    request = SumRequest(
        **fields,
        credentials=_checks.mapping("credentials", credentials, MalformedError),
        message=bytes(payload[size:]),
    )
    require_canonical(_header(request, size), text)
    require_canonical(dict(request.credentials), bytes(payload[:size]))
    return request


def plan_digest(plan: Plan, tensors: Tensors) -> bytes:
    """SHA-256 of what all clients of a round are asked alike: settings, and the tensors, by name,
    that they are sent. Who was sent others has another digest, 32 bytes."""
    alike = {name: value for name, value in plan_fields(plan).items() if name not in _OWN}
    digest = hashlib.sha256(b"fedloom plan\0" + _json.canonical(alike))
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"\0{name}\0{value.dtype}\0{value.shape}\0".encode())
        digest.update(value.tobytes())
    return digest.digest()


_OWN: Final = frozenset(
    {
        "nonce", "client", "seed", "downlink_codec", "base_round", "keep", "offset_round",
        "offset_ranks", "max_update_bytes",
    }
)  # fmt: skip
"""Fields of a plan that are one client's, or say how the tensors travel and not what they are."""


def _header(request: SumRequest, credentials_bytes: int) -> dict[str, object]:
    return {
        "job": request.job,
        "round": request.round,
        "client": request.client,
        "credentials_bytes": credentials_bytes,
    }
