# SPDX-License-Identifier: Apache-2.0
"""Weights of updates that are summed under a mask, so that the server learns their sum alone.

Client i sends w_i·x_i on the codec's grid (codecs/common_grid.py) and behind it w_i, in the same
masked sum. The server sees Σ w_i·x_i and Σ w_i, whose quotient is the weighted mean, and of no
client what it weighs.

A weight is a share of the full one, w = ω/65535 with ω a whole number from 1 to 65535: of
n samples ⌊65535·min(n, N)/N⌋, and at least 1, for an N that all clients know. It travels as the
digits of ω to the base L + 1, lowest first, where 0 to L are the codec's integers: so each digit is
one integer more for the same modulus, and

    Σ ω_i = Σ_k (L + 1)ᵏ · (sum of digit k)

is exact for as many clients as the modulus is for. Since w ≤ 1, no update is longer for its weight.

*Source* weighted secure sums as Bonawitz et al., "Practical Secure Aggregation for
Privacy-Preserving Machine Learning", CCS 2017, section 1, have them, [w·x, w]. Digits are ours: a
weight of 16 bits beside values of 8 needs no wider modulus.
*Cost* 2 integers a client with 8 bits a value, 16 with one.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from aggregation.errors import CodecError, PayloadMalformedError

FULL: Final = (1 << 16) - 1
"""ω of the full weight."""


def weight_of_samples(samples: int, full_at: int) -> int:
    """ω of a client with so many samples, where `full_at` and more have the full weight.

    Raises: CodecError for a negative number, or a `full_at` below 1.
    """
    if samples < 0 or full_at < 1:
        raise CodecError(
            "weight: expected 0 samples or more, and the full weight from 1 on, found "
            f"{samples} and {full_at}"
        )
    return max(1, min(samples, full_at) * FULL // full_at)


def weight_of_share(share: float) -> int:
    """ω of a share above 0 and up to 1. Raises: CodecError for another."""
    if not 0 < share <= 1:
        raise CodecError(f"weight: expected a share above 0, at most 1, found {share!r}")
    return max(1, int(share * FULL))


def digit_count(levels: int) -> int:
    """Digits of a weight, for integers from 0 to `levels`, 1 or more."""
    count, reached = 0, 1
    while reached <= FULL:
        count, reached = count + 1, reached * (levels + 1)
    return count


def digits(weight: int, levels: int) -> np.ndarray:
    """ω as uint32 [digit_count]. Raises: CodecError unless it is from 1 to 65535."""
    if not 1 <= weight <= FULL:
        raise CodecError(f"weight: expected 1 to {FULL}, found {weight}")
    found = np.empty(digit_count(levels), np.uint32)
    for place in range(found.size):
        weight, found[place] = divmod(weight, levels + 1)
    return found


def summed_weight(sums: np.ndarray, count: int, levels: int) -> int:
    """Σ ω of `count` clients, 1 or more, of whose digits `sums`, [digit_count], are the sums.

    Raises: CodecError for another number of digits, or sums that so many clients cannot have.
    """
    if sums.shape != (digit_count(levels),):
        raise CodecError(
            f"sums of weights: expected shape ({digit_count(levels)},), found {sums.shape}"
        )
    parts = [int(part) for part in sums]
    total = sum(part * (levels + 1) ** place for place, part in enumerate(parts))
    if max(parts) > count * levels or not count <= total <= count * FULL:
        raise PayloadMalformedError(
            f"sums of weights: expected {count} to {count * FULL} of {count} clients, in digits of "
            f"at most {count * levels}, found {total} in {parts}"
        )
    return total
