# SPDX-License-Identifier: Apache-2.0
"""A set of positions out of a known number, both counts known to the reader, in about as many bits
as its entropy: what the sparse codecs have in common.

*Source* Golomb, "Run-Length Encodings", IEEE Transactions on Information Theory, 1966: the gap to
the position before, g = q·M + r positions skipped, as q in unary and r in truncated binary. M is
the optimum of Gallager and van Voorhis, "Optimal Source Codes for Geometrically Distributed Integer
Alphabets", same journal, 1975: the least M with qᴹ + qᴹ⁺¹ ≤ 1, q = 1 - count/size.

With b = ⌊log₂ M⌋ and u = 2ᵇ⁺¹ - M (remainders below u need b bits, others b + 1), the bits are

    1            only if M > 1: 1 if the positions were stirred
    b · count    r where r < u, (r + u) >> 1 elsewhere: the lowest bit of all, then the next, ...
    1 each       (r + u) & 1, for every r ≥ u
    q + 1 each   q zeros and a one

and whoever packs them into bytes packs the lowest first and fills the last byte with zeros. From
about 38 % on, M is 1, and the bits are a plain mask that ends with the last position.

*Stirred* positions are coded, in increasing order, after a fixed bijection of 0 … size - 1. A gap
costs the more or less than its share the more regular gaps are (every 20th value); after the
bijection they look geometric, whatever the set. The shorter of the two is taken: where large values
stand together, the plain one is often shorter than the entropy of a set without order.

*Differs from source* The parts of the code words stand in streams of their own, so that nothing is
read one code word after another.
*Cost* linear both ways. Writing takes about 75 bytes a position and a byte for each of `size`;
reading 4 MiB or less, whatever the counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from typing import Final

import numpy as np

from aggregation.errors import PayloadMalformedError, PayloadTooLongError, PayloadTruncatedError

_BLOCK: Final = 1 << 16  # bits or positions that are read at a time
_MULTIPLIERS: Final = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_INVERSES: Final = tuple(pow(number, -1, 1 << 64) for number in _MULTIPLIERS)


@dataclass(frozen=True, slots=True)
class Golomb:
    """The code of gaps."""

    parameter: int  # M

    @classmethod
    def of(cls, size: int, count: int) -> Golomb:
        """The shortest one for `count` positions, 1 or more, anywhere below `size`."""
        if 2 * count >= size:
            return cls(1)
        # Decimal rounds correctly everywhere: both sides must find the same parameter.
        with localcontext(Context(prec=40)):
            miss = 1 - Decimal(count) / Decimal(size)
            return cls(math.ceil(-(1 + miss).ln() / miss.ln()))

    @property
    def low_bits(self) -> int:
        """Bits that every remainder has, b."""
        return self.parameter.bit_length() - 1

    @property
    def short(self) -> int:
        """Remainders that have no bit more, u; all of them if M is a power of two."""
        return (2 << self.low_bits) - self.parameter

    @property
    def flags(self) -> int:
        """Bits that say whether positions were stirred."""
        return int(self.parameter > 1)


def most_bits(size: int, count: int) -> int:
    """The most bits that `encode_positions` gives."""
    code = Golomb.of(size, count)
    skipped = size - count
    # An extra bit takes `short` from what the unary parts can spend at a bit for `parameter`.
    longs = 0 if code.short == code.parameter else min(count, skipped // code.short)
    unary = count + (skipped - longs * code.short) // code.parameter
    return code.flags + code.low_bits * count + longs + unary


def encode_positions(positions: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Bits, uint8 of 0 and 1, for increasing positions, int64 [count], one or more; and the same
    positions in the order in which `decode_positions` will give them."""
    code = Golomb.of(size, positions.size)
    plain = _bits(code, positions, stirred=False)
    if not code.flags:
        return plain, positions
    mask = np.zeros(size, bool)
    mask[stir(positions, size)] = True
    elsewhere = np.flatnonzero(mask)
    stirred = _bits(code, elsewhere, stirred=True)
    if stirred.size < plain.size:
        return stirred, unstir(elsewhere, size)
    return plain, positions


def decode_positions(
    data: np.ndarray, start: int, size: int, count: int
) -> Iterator[tuple[int, np.ndarray]]:
    """The positions of `encode_positions`, in blocks: (number of those before, int64 [block]).

    `data`: uint8, all bytes up to the end of the payload; `start`: the first bit. `count` different
    positions below `size` come before the end, or one of these is raised by then:
    PayloadTruncatedError, PayloadTooLongError, PayloadMalformedError.
    """
    code = Golomb.of(size, count)
    end = 8 * data.size
    most = (start + most_bits(size, count) + 7) // 8
    if data.size > most:
        raise PayloadTooLongError(f"positions: expected at most {most} bytes, found {data.size}")
    lows = start + code.flags
    extras = lows + code.low_bits * count
    if extras > end:
        raise PayloadTruncatedError(
            f"positions: expected {(extras + 7) // 8} bytes or more, found {data.size}"
        )
    stirred = bool(code.flags and read_bits(data, start, 1)[0])
    unary = extras + _longs(data, code, lows, count)
    found, last, last_end = 0, -1, unary - 1
    for at in range(unary, end, _BLOCK):
        ends = np.flatnonzero(read_bits(data, at, min(_BLOCK, end - at)))[: count - found] + at
        if not ends.size:
            continue
        remainders = _lows(data, code, lows, count, found, ends.size)
        long = remainders >= code.short
        longs = int(np.count_nonzero(long))
        remainders[long] += remainders[long] - code.short + read_bits(data, extras, longs)
        skipped = (np.diff(ends, prepend=last_end) - 1) * code.parameter + remainders
        positions = np.cumsum(skipped + 1) + last
        last, last_end = int(positions[-1]), int(ends[-1])
        if last >= size:
            raise PayloadMalformedError(f"positions: expected all below {size}, found {last}")
        # Only positions below `size` may be led back: walks from others need not end.
        yield found, unstir(positions, size) if stirred else positions
        found += ends.size
        extras += longs
        if found == count:
            _require_end(data, last_end)
            return
    raise PayloadTruncatedError(f"positions: expected {count}, found the bits of {found}")


def read_bits(data: np.ndarray, start: int, count: int) -> np.ndarray:
    """`count` bits from bit `start` on, lowest first, as uint8 of 0 and 1."""
    first, past = start >> 3, (start + count + 7) >> 3
    bits = np.unpackbits(data[first:past], bitorder="little")
    return bits[start & 7 : (start & 7) + count]


def stir(positions: np.ndarray, size: int) -> np.ndarray:
    """A fixed bijection of 0 … size - 1, which leaves nothing of most patterns. Not sorted.

    Multiplying by odd numbers and folding the upper half of the bits into the lower are bijections
    below the next power of two; what they lead beyond `size` is led on until it is back. No two
    walks meet, so all of them together take fewer than `size` steps.
    """
    bits = (size - 1).bit_length()
    mask, half = np.uint64((1 << bits) - 1), np.uint64((bits + 1) // 2)

    def step(numbers: np.ndarray) -> np.ndarray:
        for multiplier in _MULTIPLIERS:
            numbers = (numbers * np.uint64(multiplier)) & mask
            numbers ^= numbers >> half
        return numbers

    return _walk(positions, size, step)


def unstir(positions: np.ndarray, size: int) -> np.ndarray:
    """The inverse of `stir`."""
    bits = (size - 1).bit_length()
    mask, half = np.uint64((1 << bits) - 1), np.uint64((bits + 1) // 2)

    def step(numbers: np.ndarray) -> np.ndarray:
        for inverse in reversed(_INVERSES):
            numbers = ((numbers ^ (numbers >> half)) * np.uint64(inverse)) & mask
        return numbers

    return _walk(positions, size, step)


def _walk(positions: np.ndarray, size: int, step: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    numbers = step(positions.astype(np.uint64))
    outside = np.flatnonzero(numbers >= size)
    while outside.size:
        moved = step(numbers[outside])
        numbers[outside] = moved
        outside = outside[moved >= size]
    return numbers.astype(np.int64)


def _bits(code: Golomb, positions: np.ndarray, *, stirred: bool) -> np.ndarray:
    skipped = np.diff(positions, prepend=-1) - 1
    quotients = skipped // code.parameter
    remainders = skipped - quotients * code.parameter
    long = remainders >= code.short
    lows = np.where(long, (remainders + code.short) >> 1, remainders)
    extras = (remainders[long] + code.short) & 1
    ends = np.cumsum(quotients + 1) - 1
    unary = np.zeros(int(ends[-1]) + 1, np.uint8)
    unary[ends] = 1
    parts = [np.full(code.flags, stirred, np.uint8)]
    parts += [((lows >> bit) & 1).astype(np.uint8) for bit in range(code.low_bits)]
    return np.concatenate([*parts, extras.astype(np.uint8), unary])


def _lows(
    data: np.ndarray, code: Golomb, start: int, count: int, first: int, number: int
) -> np.ndarray:
    """The low bits of `number` remainders out of `count`, int64."""
    lows = np.zeros(number, np.int64)
    for bit in range(code.low_bits):
        plane = read_bits(data, start + bit * count + first, number)
        lows |= plane.astype(np.int64) << bit
    return lows


def _longs(data: np.ndarray, code: Golomb, start: int, count: int) -> int:
    """How many remainders have an extra bit."""
    if code.short == code.parameter:
        return 0
    return sum(
        int(
            np.count_nonzero(
                _lows(data, code, start, count, first, min(_BLOCK, count - first)) >= code.short
            )
        )
        for first in range(0, count, _BLOCK)
    )


def _require_end(data: np.ndarray, last: int) -> None:
    """Raises: CodecError unless the bit `last` stands in the last byte, with zeros behind it."""
    expected = last // 8 + 1
    if data.size > expected:
        raise PayloadTooLongError(f"positions: expected {expected} bytes, found {data.size}")
    if int(data[-1]) >> (last % 8 + 1):
        raise PayloadMalformedError("positions: expected unused bits to be 0, found others")
