# SPDX-License-Identifier: Apache-2.0
"""The bytes that carry one header and one payload, the same form for updates and plans.

    offset          bytes  little-endian
    0               4      magic: which kind of container
    4               2      version
    6               4      H, header length
    10              H      header: canonical JSON, at most MAX_HEADER_BYTES
    10 + H          8      P, payload length
    18 + H          P      payload: a codec's bytes
    18 + H + P      4      CRC-32 of all before it

The length is exact: one byte less is truncated, one more is too long. The checksum finds accidents;
who sent a container is known from the connection, not from here.
"""

from __future__ import annotations

import struct
import zlib
from typing import Final

from protocol import _json
from protocol.errors import (
    ChecksumError,
    MalformedError,
    TooLongError,
    TruncatedError,
    VersionError,
)
from protocol.limits import MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES

CONTAINER_VERSION: Final = 1

_PREFIX: Final = struct.Struct("<4sHI")
_LENGTH: Final = struct.Struct("<Q")
_CHECKSUM: Final = struct.Struct("<I")
FIXED_BYTES: Final = _PREFIX.size + _LENGTH.size + _CHECKSUM.size
"""Bytes of a container beside its header and its payload."""

Blob = bytes | bytearray | memoryview


def pack(magic: bytes, header: object, payload: Blob) -> bytes:
    """The container of a JSON-ready header and a payload."""
    text = _json.canonical(header)
    body = memoryview(payload).cast("B")
    if len(text) > MAX_HEADER_BYTES:
        raise TooLongError(
            f"header: expected at most {MAX_HEADER_BYTES} bytes, found {len(text)}; "
            "send fewer metrics or shorter names"
        )
    if len(body) > MAX_PAYLOAD_BYTES:
        raise TooLongError(
            f"payload: expected at most {MAX_PAYLOAD_BYTES} bytes, found {len(body)}"
        )
    start = _PREFIX.pack(magic, CONTAINER_VERSION, len(text)) + text + _LENGTH.pack(len(body))
    return b"".join((start, body, _CHECKSUM.pack(zlib.crc32(body, zlib.crc32(start)))))


def unpack(magic: bytes, blob: Blob, *, max_bytes: int) -> tuple[object, bytes, memoryview]:
    """Parsed header, its text as it came, and a read-only view of the payload.

    Raises: ContainerError, one subclass for each way in which the bytes can be wrong.
    Cost: linear in the blob; nothing is allocated from a length that the blob claims.
    """
    view = memoryview(blob).cast("B").toreadonly()
    if len(view) > max_bytes:
        raise TooLongError(f"container: expected at most {max_bytes} bytes, found {len(view)}")
    if len(view) < _PREFIX.size:
        raise TruncatedError(
            f"container: expected at least {_PREFIX.size} bytes, found {len(view)}"
        )
    found_magic, version, header_bytes = _PREFIX.unpack_from(view)
    if found_magic != magic:
        raise MalformedError(f"container: expected it to start {magic!r}, found {found_magic!r}")
    if version != CONTAINER_VERSION:
        raise VersionError(
            f"container: expected version {CONTAINER_VERSION}, found {version}; "
            "both sides need releases that share a version"
        )
    if header_bytes > MAX_HEADER_BYTES:
        raise TooLongError(
            f"header: expected at most {MAX_HEADER_BYTES} bytes, found {header_bytes}"
        )
    payload_at = _PREFIX.size + header_bytes + _LENGTH.size
    if len(view) < payload_at:
        raise TruncatedError(f"container: expected {payload_at} bytes or more, found {len(view)}")
    (payload_bytes,) = _LENGTH.unpack_from(view, payload_at - _LENGTH.size)
    end = payload_at + payload_bytes
    if len(view) != end + _CHECKSUM.size:
        wrong = TruncatedError if len(view) < end + _CHECKSUM.size else TooLongError
        raise wrong(f"container: expected {end + _CHECKSUM.size} bytes, found {len(view)}")
    (checksum,) = _CHECKSUM.unpack_from(view, end)
    if checksum != zlib.crc32(view[:end]):
        raise ChecksumError("container: its bytes changed on the way, the checksum differs; resend")
    text = bytes(view[_PREFIX.size : payload_at - _LENGTH.size])
    try:
        header = _json.parse(text)
    except ValueError as error:
        raise MalformedError(f"header: {error}") from None
    return header, text, view[payload_at:end]


def require_canonical(header: object, text: bytes) -> None:
    """Refuses a header that says the same in other bytes, so that one update has one encoding."""
    if _json.canonical(header) != text:
        raise MalformedError(
            "header: expected canonical JSON (sorted keys, no spaces), found another spelling"
        )
