# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import secrets
from fractions import Fraction
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.errors import SecureSumError
from aggregation.secure_aggregation import shamir
from aggregation.secure_aggregation.shamir import PRIME, coefficients, combine, reconstruct, share

SECRETS = st.integers(0, PRIME - 1) | st.sampled_from([0, 1, 2**256 - 1, 2**256, PRIME - 1])
HOLDERS = st.lists(
    st.integers(1, 300) | st.integers(1, PRIME - 1), min_size=1, max_size=12, unique=True
)


def literal(shares: dict[int, int]) -> int:
    """Lagrange at 0 in rational numbers, taken modulo the prime at the end."""
    total = Fraction(0)
    for x, y in shares.items():
        term = Fraction(y)
        for z in shares:
            if z != x:
                term *= Fraction(z, z - x)
        total += term
    return total.numerator * pow(total.denominator, -1, PRIME) % PRIME


@given(secret=SECRETS, holders=HOLDERS, data=st.data())
def test_any_threshold_of_shares_gives_the_secret(secret, holders, data):
    threshold = data.draw(st.integers(1, len(holders)))
    shares = share(secret, threshold=threshold, holders=holders)
    kept = data.draw(st.permutations(holders))[: data.draw(st.integers(threshold, len(holders)))]
    chosen = {holder: shares[holder] for holder in kept}
    assert reconstruct(chosen, threshold=threshold) == secret
    lowest = {holder: shares[holder] for holder in sorted(chosen)[:threshold]}
    assert literal(lowest) == secret


@given(secret=SECRETS, guess=SECRETS, holders=HOLDERS)
def test_one_share_less_fits_every_secret(secret, guess, holders):
    threshold = len(holders)
    shares = share(secret, threshold=threshold, holders=holders)
    if threshold == 1:
        return
    # a share of the missing holder exists that turns the others into the guess
    *known, missing = holders
    weights = coefficients(holders)
    part = combine(weights[:-1], [shares[holder] for holder in known])
    needed = (guess - part) * pow(weights[-1], -1, PRIME) % PRIME
    others = {holder: shares[holder] for holder in known}
    assert reconstruct(others | {missing: needed}, threshold=threshold) == guess


def test_coefficients_of_a_set_serve_all_secrets_that_it_holds():
    holders = [9, 2, 77, 4]
    weights = coefficients(holders)
    for _ in range(20):
        secret = secrets.randbelow(PRIME)
        shares = share(secret, threshold=4, holders=holders)
        assert combine(weights, [shares[holder] for holder in holders]) == secret


def test_every_subset_gives_the_secret_and_smaller_ones_do_not():
    shares = share(12345, threshold=3, holders=range(1, 7))
    for chosen in combinations(shares, 3):
        assert reconstruct({x: shares[x] for x in chosen}, threshold=3) == 12345
    for chosen in combinations(shares, 2):
        assert reconstruct({x: shares[x] for x in chosen}, threshold=2) != 12345


def test_a_polynomial_that_is_written_down(monkeypatch):
    drawn = iter([166, 94])  # 1234 + 166x + 94x²
    monkeypatch.setattr(shamir.secrets, "randbelow", lambda _: next(drawn))
    shares = share(1234, threshold=3, holders=range(1, 7))
    assert shares == {1: 1494, 2: 1942, 3: 2578, 4: 3402, 5: 4414, 6: 5614}
    assert coefficients([1, 2, 3]) == (3, PRIME - 3, 1)


def test_shares_are_drawn_anew():
    first, second = (share(7, threshold=2, holders=[1, 2]) for _ in range(2))
    assert first != second


def test_the_prime_is_one_and_the_first_above_two_to_the_256():
    def composite(n: int) -> bool:
        odd, twos = n - 1, 0
        while odd % 2 == 0:
            odd, twos = odd // 2, twos + 1
        for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53):
            x = pow(base, odd, n)
            if x not in (1, n - 1) and all((x := x * x % n) != n - 1 for _ in range(twos - 1)):
                return True
        return False

    assert not composite(PRIME)
    assert all(composite(n) for n in range(2**256 + 1, PRIME, 2))
    assert (PRIME - 1).bit_length() <= 8 * shamir.SHARE_BYTES


@pytest.mark.parametrize(
    ("secret", "threshold", "holders", "words"),
    [
        (PRIME, 1, [1], "secret"),
        (-1, 1, [1], "secret"),
        (True, 1, [1], "secret"),
        (1, 1, [0], "holder: "),
        (1, 1, [PRIME], "holder: "),
        (1, 2, [3, 3], "given twice"),
        (1, 1, [], "at least one"),
        (1, 0, [1, 2], "threshold: expected 1 to 2"),
        (1, 3, [1, 2], "threshold: expected 1 to 2"),
    ],
)
def test_what_cannot_be_shared_is_refused(secret, threshold, holders, words):
    with pytest.raises(SecureSumError, match=words):
        share(secret, threshold=threshold, holders=holders)


def test_what_cannot_be_put_together_is_refused():
    with pytest.raises(SecureSumError, match="at least 2, found 1"):
        reconstruct({1: 5}, threshold=2)
    with pytest.raises(SecureSumError, match="at least 0"):
        reconstruct({}, threshold=0)
    with pytest.raises(SecureSumError, match="share: expected"):
        reconstruct({1: PRIME}, threshold=1)
    with pytest.raises(SecureSumError, match="expected 1, found 2"):
        combine([1], [1, 2])
    with pytest.raises(SecureSumError, match="given twice"):
        coefficients([4, 4])
