# SPDX-License-Identifier: Apache-2.0
"""Writing and reading of binary fields, little-endian; a reader believes no length that it is told
before it has compared it with what is there."""

from __future__ import annotations

import struct

from aggregation.errors import SecureMessageError

_U16, _U32, _U64 = struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<Q")


class Writer:
    """Fields one after another; each call returns the writer."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def raw(self, value: bytes) -> Writer:
        self._parts.append(value)
        return self

    def u8(self, value: int) -> Writer:
        return self.raw(bytes((value,)))

    def u16(self, value: int) -> Writer:
        return self.raw(_U16.pack(value))

    def u32(self, value: int) -> Writer:
        return self.raw(_U32.pack(value))

    def u64(self, value: int) -> Writer:
        return self.raw(_U64.pack(value))

    def short(self, value: bytes) -> Writer:
        """Up to 65,535 bytes with their length before them."""
        return self.u16(len(value)).raw(value)

    def long(self, value: bytes) -> Writer:
        """Any number of bytes with their length before them."""
        return self.u64(len(value)).raw(value)

    def done(self) -> bytes:
        return b"".join(self._parts)


class Reader:
    """The inverse, of bytes from elsewhere. Every method raises SecureMessageError."""

    def __init__(self, blob: bytes | memoryview) -> None:
        self._view = memoryview(blob).cast("B")
        self._at = 0

    def view(self, size: int) -> memoryview:
        """The next bytes, not copied."""
        end = self._at + size
        if end > len(self._view):
            raise SecureMessageError(
                f"message: expected {size} bytes more, found {len(self._view) - self._at}"
            )
        part = self._view[self._at : end]
        self._at = end
        return part

    def raw(self, size: int) -> bytes:
        return bytes(self.view(size))

    def u8(self) -> int:
        return self.view(1)[0]

    def u16(self) -> int:
        return int(_U16.unpack(self.view(2))[0])

    def u32(self) -> int:
        return int(_U32.unpack(self.view(4))[0])

    def u64(self) -> int:
        return int(_U64.unpack(self.view(8))[0])

    def short(self, limit: int) -> bytes:
        size = self.u16()
        if size > limit:
            raise SecureMessageError(f"message: expected at most {limit} bytes, found {size}")
        return self.raw(size)

    def text(self, limit: int) -> str:
        try:
            return self.short(limit).decode()
        except UnicodeDecodeError:
            raise SecureMessageError("message: expected UTF-8, found other bytes") from None

    def long(self) -> memoryview:
        return self.view(self.u64())

    def rest(self) -> memoryview:
        """All that is left."""
        return self.view(len(self._view) - self._at)

    def count(self, limit: int, *, each: int) -> int:
        """How many entries follow, of at least `each` bytes."""
        count = self.u32()
        left = len(self._view) - self._at
        if count > limit or count * each > left:
            raise SecureMessageError(
                f"message: {count} entries are said to follow, {left} bytes and at most {limit} can"
            )
        return count

    def end(self) -> None:
        if self._at != len(self._view):
            raise SecureMessageError(
                f"message: expected its end, found {len(self._view) - self._at} bytes more"
            )
