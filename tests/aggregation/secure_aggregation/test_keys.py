# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import hmac
from itertools import product

import pytest

from aggregation.errors import SecureMessageError, SecureSumError
from aggregation.secure_aggregation import keys

ATTEMPT, OTHER = bytes(32), bytes([1]) * 32


def test_agreement_is_that_of_rfc_7748_section_5_2():
    scalar = "a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4"
    point = "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c"
    assert keys.agree(bytes.fromhex(scalar), bytes.fromhex(point)).hex() == (
        "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552"
    )


def test_public_keys_are_those_of_rfc_7748_section_6_1():
    bob = "5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb"
    assert keys.public_of(bytes.fromhex(bob)).hex() == (
        "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    )


def test_derived_keys_are_hkdf_written_out():
    """RFC 5869 by hand: extract, then one block of expand."""
    agreed, names = bytes(range(32)), ("a", "Zoë")
    info = b"fedloom secure sum"
    for part in (b"shares", b"a", "Zoë".encode()):
        info += len(part).to_bytes(2, "big") + part
    extracted = hmac.digest(ATTEMPT, agreed, hashlib.sha256)
    expected = hmac.digest(extracted, info + b"\x01", hashlib.sha256)
    assert keys.derive(agreed, attempt=ATTEMPT, purpose=keys.SHARES, names=names) == expected


def test_every_part_of_the_context_changes_the_key():
    agreed = (bytes(32), OTHER)
    purposes = (keys.SHARES, keys.PAIR_MASK, keys.SELF_MASK)
    names = (("a", "b"), ("b", "a"), ("ab", ""), ("a",), ("a", "b", ""))
    found = {
        keys.derive(secret, attempt=attempt, purpose=purpose, names=who)
        for secret, attempt, purpose, who in product(agreed, (ATTEMPT, OTHER), purposes, names)
    }
    assert len(found) == 2 * 2 * 3 * 5


def test_pairs_agree_and_their_mask_has_no_direction():
    one, other = keys.new_pair(), keys.new_pair()
    agreed = keys.agree(one.secret, other.public)
    assert agreed == keys.agree(other.secret, one.public)
    assert keys.pair_mask_key(agreed, attempt=ATTEMPT, one="b", other="a") == keys.pair_mask_key(
        agreed, attempt=ATTEMPT, one="a", other="b"
    )
    assert len({keys.pair_mask_key(agreed, attempt=ATTEMPT, one="a", other=o) for o in "bcd"}) == 3
    assert len({keys.self_mask_key(agreed, attempt=ATTEMPT, name=name) for name in "abc"}) == 3


def test_secrets_are_not_printed():
    pair = keys.new_pair()
    assert pair.secret.hex() not in repr(pair) and repr(pair.secret) not in repr(pair)


@pytest.mark.parametrize("public", [bytes(32), b"\x01" + bytes(31)], ids=["zero", "one"])
def test_keys_of_low_order_are_refused(public):
    with pytest.raises(SecureSumError, match="same secret with every other key"):
        keys.agree(keys.new_pair().secret, public)


def test_sealed_shares_open_for_their_receiver_in_their_direction_and_attempt_only():
    agreed = bytes(range(32))
    box = keys.seal(b"share", agreed, attempt=ATTEMPT, sender="a", receiver="b")
    assert len(box) == len(b"share") + keys.TAG_BYTES
    assert keys.unseal(box, agreed, attempt=ATTEMPT, sender="a", receiver="b") == b"share"
    wrong = [
        (box, agreed, ATTEMPT, "b", "a"),
        (box, agreed, OTHER, "a", "b"),
        (box, bytes(32), ATTEMPT, "a", "b"),
        (box[:-1] + bytes([box[-1] ^ 1]), agreed, ATTEMPT, "a", "b"),
        (bytes([box[0] ^ 1]) + box[1:], agreed, ATTEMPT, "a", "b"),
    ]
    for sealed, secret, attempt, sender, receiver in wrong:
        with pytest.raises(SecureMessageError, match="not from"):
            keys.unseal(sealed, secret, attempt=attempt, sender=sender, receiver=receiver)


def test_commitments_bind_seed_name_and_attempt():
    made = {
        keys.commitment(seed, attempt=attempt, name=name)
        for seed, attempt, name in product((ATTEMPT, OTHER), (ATTEMPT, OTHER), "ab")
    }
    assert len(made) == 8
