# SPDX-License-Identifier: Apache-2.0
"""Random words that are the same on every machine, release and version of numpy.

Both sides of a network draw them on their own, so they follow from a published function of integers
alone: Philox4x32-10, which turns a 128-bit counter and a 64-bit key into four 32-bit words. Any
part of a stream can be drawn without the part before it.

*Source* Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011; the
known answers of its library, Random123, are among the tests.

A seed of 64 bits is the key, low half first. The four words of the counter are

    0, 1   which four words of the stream, low half first
    2      the stream
    3      what the stream is for: one of the constants below, so that two uses of one seed
           share nothing

*Cost* 8 to 12 ns a word on one core; some 80 bytes of memory for every four words asked for at
once, so callers ask for a few thousand at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

RANDOM_K: Final = 1
SEED_SCALARS: Final = 2
ROTATION: Final = 3

_ROUNDS: Final = 10
_MULTIPLIER_0: Final = np.uint64(0xD2511F53)
_MULTIPLIER_1: Final = np.uint64(0xCD9E8D57)
_WEYL_0: Final = 0x9E3779B9
_WEYL_1: Final = 0xBB67AE85
_LOW: Final = np.uint64(0xFFFFFFFF)
_HALF: Final = np.uint64(32)

Counter = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def philox4x32(counter: Counter, key: tuple[int, int]) -> Counter:
    """Four random words for each counter.

    *Shapes* all arrays uint64, of shapes that broadcast, holding values below 2³²; so does what is
    returned, in the common shape.
    """
    a, b, c, d = (np.array(part, np.uint64) for part in np.broadcast_arrays(*counter))
    product_0, product_1 = np.empty_like(a), np.empty_like(a)
    key_0, key_1 = key
    # in place: the arrays of one call then stay in a core's cache, which makes it twice as fast
    for _ in range(_ROUNDS):
        np.multiply(a, _MULTIPLIER_0, out=product_0)
        np.multiply(c, _MULTIPLIER_1, out=product_1)
        np.right_shift(product_1, _HALF, out=a)
        a ^= b
        a ^= np.uint64(key_0)
        np.right_shift(product_0, _HALF, out=c)
        c ^= d
        c ^= np.uint64(key_1)
        np.bitwise_and(product_1, _LOW, out=b)
        np.bitwise_and(product_0, _LOW, out=d)
        key_0 = (key_0 + _WEYL_0) & 0xFFFFFFFF
        key_1 = (key_1 + _WEYL_1) & 0xFFFFFFFF
    return a, b, c, d


def words(
    seed: int, purpose: int, streams: Sequence[int] | np.ndarray, start: int, count: int
) -> np.ndarray:
    """Words `start` to `start + count` of each stream, uint32 [len(streams), count].

    `seed` is from 0 to below 2⁶⁴, a stream from 0 to below 2³². Raises: ValueError.
    """
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed: expected 0 to below 2**64, found {seed}")
    numbers = np.asarray(streams, np.int64).reshape(-1, 1)
    if numbers.size and not 0 <= numbers.min() <= numbers.max() < 1 << 32:
        raise ValueError(f"streams: expected 0 to below 2**32, found {numbers.ravel()}")
    first, last = start // 4, (start + count + 3) // 4
    index = np.arange(first, last, dtype=np.uint64)
    counter = (index & _LOW, index >> _HALF, numbers.astype(np.uint64), np.array(purpose, "u8"))
    drawn = np.empty((len(numbers), last - first, 4), np.uint32)
    for place, part in enumerate(philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))):
        drawn[..., place] = part
    skipped = start - 4 * first
    return drawn.reshape(len(numbers), 4 * (last - first))[:, skipped : skipped + count]


def double_words(seed: int, purpose: int, start: int, count: int) -> np.ndarray:
    """Pairs `start` to `start + count` of stream 0's words, low word first, as uint64 [count]."""
    pairs = words(seed, purpose, [0], 2 * start, 2 * count)[0].reshape(count, 2).astype(np.uint64)
    return pairs[:, 0] | pairs[:, 1] << _HALF
