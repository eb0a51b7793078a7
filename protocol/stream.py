# SPDX-License-Identifier: Apache-2.0
"""The messages of a split session: what a device and the server that holds the body say in turns.

    device                                server
    open    job, round, client, nonce  →
                                       ←  ready    the last number that was answered, and limits
    forward number, rows: states       →
                                       ←  left     number: what the body made of them
    backward number: gradient          →
                                       ←  entered  number: the gradient at what was sent
    close                              →

Numbers count a device's `forward` and `backward` messages from 1, together. A session may be
opened again after a broken connection: `ready` then says which number was answered last, and a
message that was answered already is answered again from memory. Magic `FLSP`; the form is that of
container.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from protocol import _checks
from protocol.container import Blob, pack, require_canonical, unpack
from protocol.errors import MalformedError
from protocol.limits import (
    MAX_BATCH_SIZE,
    MAX_CLIENT_LENGTH,
    MAX_NONCE_LENGTH,
    MAX_REASON_LENGTH,
    MAX_ROUND,
    MAX_STEPS,
    MIN_NONCE_LENGTH,
)

STREAM_MAGIC: Final = b"FLSP"
METHOD: Final = "/fedloom.Split/Session"
"""The gRPC method of a session: a stream of messages either way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """Begins a session, or goes on with it. One a client and round."""

    kind: Literal["open"] = "open"
    job: str
    round: int
    client: str
    nonce: str  # hex, from the plan

    def __post_init__(self) -> None:
        error = MalformedError
        _checks.hexadecimal("job", self.job, 64, 64, error)
        _checks.integer("round", self.round, 0, MAX_ROUND, error)
        _checks.text("client", self.client, MAX_CLIENT_LENGTH, error)
        _checks.hexadecimal("nonce", self.nonce, MIN_NONCE_LENGTH, MAX_NONCE_LENGTH, error)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The server's answer to `Open`."""

    kind: Literal["ready"] = "ready"
    answered: int  # the last number that was answered; 0: none yet

    def __post_init__(self) -> None:
        _checks.integer("answered", self.answered, 0, MAX_STEPS, MalformedError)


@dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """Hidden states or a gradient. The payload is theirs, after a mask where there is one.

    `keep` of a "forward" says that a "backward" will follow.
    """

    kind: Literal["forward", "left", "backward", "entered"]
    number: int
    rows: int
    keep: bool = True

    def __post_init__(self) -> None:
        error = MalformedError
        _checks.integer("number", self.number, 1, MAX_STEPS, error)
        _checks.integer("rows", self.rows, 1, MAX_BATCH_SIZE, error)
        _checks.boolean("keep", self.keep, error)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """Why the server ends a session. With `again` the same session may be opened again."""

    kind: Literal["refused"] = "refused"
    reason: str
    again: bool = False

    def __post_init__(self) -> None:
        _checks.text("reason", self.reason, MAX_REASON_LENGTH, MalformedError)
        _checks.boolean("again", self.again, MalformedError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    """The device has all that it came for."""

    kind: Literal["close"] = "close"


StreamMessage = Open | Ready | States | Refused | Close

_FIELDS: Final[dict[str, tuple[type[StreamMessage], tuple[str, ...]]]] = {
    "open": (Open, ("kind", "job", "round", "client", "nonce")),
    "ready": (Ready, ("kind", "answered")),
    **{
        kind: (States, ("kind", "number", "rows", "keep"))
        for kind in ("forward", "left", "backward", "entered")
    },
    "refused": (Refused, ("kind", "reason", "again")),
    "close": (Close, ("kind",)),
}


def pack_message(message: StreamMessage, payload: Blob = b"") -> bytes:
    """The bytes that travel."""
    return pack(STREAM_MAGIC, _to_json(message), payload)


def unpack_message(blob: Blob, *, max_bytes: int) -> tuple[StreamMessage, memoryview]:
    """A message and its payload, a read-only view of `blob`. Raises: ContainerError."""
    value, text, payload = unpack(STREAM_MAGIC, blob, max_bytes=max_bytes)
    kind = _checks.mapping("header", value, MalformedError).get("kind")
    name = _checks.one_of("kind", kind, _FIELDS, MalformedError)
    made, fields = _FIELDS[name]
    message = made(**_checks.keys("header", value, fields, MalformedError))
    require_canonical(_to_json(message), text)
    if len(payload) and not isinstance(message, States):
        raise MalformedError(f"{name}: expected no payload, found {len(payload)} bytes")
    return message, payload


def _to_json(message: StreamMessage) -> dict[str, object]:
    _, fields = _FIELDS[message.kind]
    return {name: getattr(message, name) for name in fields}
