# SPDX-License-Identifier: Apache-2.0
"""A secret cut into shares, of which a threshold gives it back and fewer tell nothing.

Over the integers modulo the prime p = 2²⁵⁶ + 297: draw f(x) = s + a₁x + … + a_{t-1}x^{t-1} with
uniform aᵢ; the share of holder x ≥ 1 is f(x). From the shares of any set X of t holders

    s = f(0) = Σ_{x∈X} λ_x·f(x),    λ_x = Π_{z∈X, z≠x} z / (z - x).

*Source* Shamir, "How to share a secret", CACM 22(11), 1979.
*Differs from source*: p is the first prime above 2²⁵⁶, so that a secret of 32 bytes is one element
and a share has 33 bytes. The λ of one set are computed once for all secrets that it holds.

*Cost* t multiplications a share; t² for the λ of a set, with one inversion, then t a secret. Python
integers do not take the same time for all values: shares are made and put together where an
observer of microseconds is taken to be absent.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Final

from aggregation.errors import SecureSumError

PRIME: Final = 2**256 + 297
SECRET_BYTES: Final = 32
SHARE_BYTES: Final = 33


def share(secret: int, *, threshold: int, holders: Sequence[int]) -> dict[int, int]:
    """A share for each holder, by the holder's number; coefficients from the system's randomness.

    Raises: SecureSumError for a secret outside 0 to p - 1, holders that repeat or lie outside
    1 to p - 1, and a threshold outside 1 to the number of holders.
    """
    _require_elements("secret", (secret,), low=0)
    _require_holders(holders)
    if not 1 <= threshold <= len(holders):
        raise SecureSumError(
            f"threshold: expected 1 to {len(holders)}, the number of holders, found {threshold}"
        )
    polynomial = [secret, *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return {holder: _value(polynomial, holder) for holder in holders}


def coefficients(holders: Sequence[int]) -> tuple[int, ...]:
    """λ of each holder of a set, in the set's order. Raises: SecureSumError as `share`."""
    _require_holders(holders)
    product = 1
    for holder in holders:
        product = product * holder % PRIME
    below = []
    for holder in holders:
        # x·Π(z - x), so that λ is the product of all z over it
        each = holder
        for other in holders:
            if other != holder:
                each = each * (other - holder) % PRIME
        below.append(each)
    return tuple(product * inverse % PRIME for inverse in _inverses(below))


def combine(weights: Sequence[int], shares: Sequence[int]) -> int:
    """The secret from `coefficients` of a set and the set's shares, in the same order.

    Raises: SecureSumError for another number of shares or a share outside 0 to p - 1.
    """
    if len(weights) != len(shares):
        raise SecureSumError(f"shares: expected {len(weights)}, found {len(shares)}")
    _require_elements("share", shares, low=0)
    return sum(weight * each for weight, each in zip(weights, shares, strict=True)) % PRIME


def reconstruct(shares: Mapping[int, int], *, threshold: int) -> int:
    """The secret from shares by holder; of more than `threshold`, the lowest numbers are used.

    Shares that are not all of one polynomial give another number and no error: whoever needs to
    know keeps a hash of the secret. Raises: SecureSumError for fewer than `threshold` shares.
    """
    if threshold < 1 or len(shares) < threshold:
        raise SecureSumError(f"shares: expected at least {threshold}, found {len(shares)}")
    used = sorted(shares)[:threshold]
    return combine(coefficients(used), [shares[holder] for holder in used])


def _value(polynomial: Sequence[int], x: int) -> int:
    result = 0
    for coefficient in reversed(polynomial):
        result = (result * x + coefficient) % PRIME
    return result


def _inverses(values: Sequence[int]) -> list[int]:
    """All inverses for the price of one and three multiplications each; no value is 0."""
    running = [1]
    for value in values:
        running.append(running[-1] * value % PRIME)
    inverse = pow(running[-1], -1, PRIME)
    found = []
    for value, before in zip(reversed(values), reversed(running[:-1]), strict=True):
        found.append(inverse * before % PRIME)
        inverse = inverse * value % PRIME
    return found[::-1]


def _require_holders(holders: Sequence[int]) -> None:
    if not holders:
        raise SecureSumError("holders: expected at least one, found none")
    if len(set(holders)) != len(holders):
        raise SecureSumError("holders: expected each once, one is given twice")
    _require_elements("holder", holders, low=1)  # f(0) is the secret itself


def _require_elements(field: str, values: Sequence[int], *, low: int) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value < PRIME:
            raise SecureSumError(
                f"{field}: expected an integer from {low} to below the prime, found another value"
            )
