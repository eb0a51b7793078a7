# SPDX-License-Identifier: Apache-2.0
"""The messages of a split session: what a device and the server that holds the body say in turns.

    device                                server
    open    job, round, client,
            nonce, lane                →
                                       ←  ready    the last number that was answered, and limits
    forward number, rows: states       →
                                       ←  left     number: what the body made of them
    backward number: gradient          →
                                       ←  entered  number: the gradient at what was sent
    close                              →

Numbers count a device's `forward` and `backward` messages from 1, together. A session may be
opened again after a broken connection: `ready` then says which number was answered last, and a
message that was answered already is answered again from memory. A client may have several sessions
in a round, each on a lane: while one waits for its answer, another's message travels.

    offset          bytes  little-endian
    0               4      magic: FLSP
    4               2      version
    6               4      H, header length
    10              H      header: canonical JSON
    10 + H          rest   payload

A message has the length that gRPC gives it, and the connection finds what changed on the way: a
checksum as in container.py would take longer than everything else that is done to a message.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final, Literal

from protocol import _checks, _json
from protocol.container import Blob, require_canonical
from protocol.errors import MalformedError, TooLongError, TruncatedError, VersionError
from protocol.limits import (
    MAX_BATCH_SIZE,
    MAX_CLIENT_LENGTH,
    MAX_HEADER_BYTES,
    MAX_LANES,
    MAX_NONCE_LENGTH,
    MAX_REASON_LENGTH,
    MAX_ROUND,
    MAX_STEPS,
    MIN_NONCE_LENGTH,
)

STREAM_MAGIC: Final = b"FLSP"
STREAM_VERSION: Final = 1
METHOD: Final = "/fedloom.Split/Session"
"""The gRPC method of a session: a stream of messages either way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """Begins a session, or goes on with it. One a client, round and lane."""

    kind: Literal["open"] = "open"
    job: str
    round: int
    client: str
    nonce: str  # hex, from the plan
    lane: int = 0

    def __post_init__(self) -> None:
        error = MalformedError
        _checks.hexadecimal("job", self.job, 64, 64, error)
        _checks.integer("round", self.round, 0, MAX_ROUND, error)
        _checks.text("client", self.client, MAX_CLIENT_LENGTH, error)
        _checks.hexadecimal("nonce", self.nonce, MIN_NONCE_LENGTH, MAX_NONCE_LENGTH, error)
        _checks.integer("lane", self.lane, 0, MAX_LANES - 1, error)


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

_PREFIX: Final = struct.Struct("<4sHI")
MESSAGE_OVERHEAD: Final = _PREFIX.size + MAX_HEADER_BYTES
"""What a message may be longer than its payload."""

_FIELDS: Final[dict[str, tuple[type[StreamMessage], tuple[str, ...]]]] = {
    "open": (Open, ("kind", "job", "round", "client", "nonce", "lane")),
    "ready": (Ready, ("kind", "answered")),
    **{
        kind: (States, ("kind", "number", "rows", "keep"))
        for kind in ("forward", "left", "backward", "entered")
    },
    "refused": (Refused, ("kind", "reason", "again")),
    "close": (Close, ("kind",)),
}


def pack_message(message: StreamMessage, *payload: Blob) -> bytes:
    """The bytes that travel; parts of the payload are put one behind the other."""
    return pack_header(_to_json(message), *payload)


def pack_header(header: object, *payload: Blob) -> bytes:
    """A message with a header of any content."""
    text = _json.canonical(header)
    return b"".join((_PREFIX.pack(STREAM_MAGIC, STREAM_VERSION, len(text)), text, *payload))


def unpack_message(blob: Blob, *, max_bytes: int) -> tuple[StreamMessage, memoryview]:
    """A message and its payload, a read-only view of `blob`. Raises: ContainerError."""
    value, text, payload = _parted(blob, max_bytes)
    kind = _checks.mapping("header", value, MalformedError).get("kind")
    name = _checks.one_of("kind", kind, _FIELDS, MalformedError)
    made, fields = _FIELDS[name]
    message = made(**_checks.keys("header", value, fields, MalformedError))
    require_canonical(_to_json(message), text)
    if len(payload) and not isinstance(message, States):
        raise MalformedError(f"{name}: expected no payload, found {len(payload)} bytes")
    return message, payload


def _parted(blob: Blob, max_bytes: int) -> tuple[object, bytes, memoryview]:
    """Parsed header, its text as it came, and the payload."""
    view = memoryview(blob).cast("B").toreadonly()
    if len(view) > max_bytes:
        raise TooLongError(f"message: expected at most {max_bytes} bytes, found {len(view)}")
    if len(view) < _PREFIX.size:
        raise TruncatedError(f"message: expected at least {_PREFIX.size} bytes, found {len(view)}")
    magic, version, length = _PREFIX.unpack_from(view)
    if magic != STREAM_MAGIC:
        raise MalformedError(f"message: expected it to start {STREAM_MAGIC!r}, found {magic!r}")
    if version != STREAM_VERSION:
        raise VersionError(
            f"message: expected version {STREAM_VERSION}, found {version}; both sides need "
            "releases that share a version"
        )
    if length > MAX_HEADER_BYTES:
        raise TooLongError(f"header: expected at most {MAX_HEADER_BYTES} bytes, found {length}")
    end = _PREFIX.size + length
    if len(view) < end:
        raise TruncatedError(f"message: expected {end} bytes or more, found {len(view)}")
    text = bytes(view[_PREFIX.size : end])
    try:
        return _json.parse(text), text, view[end:]
    except ValueError as error:
        raise MalformedError(f"header: {error}") from None


def _to_json(message: StreamMessage) -> dict[str, object]:
    _, fields = _FIELDS[message.kind]
    return {name: getattr(message, name) for name in fields}
