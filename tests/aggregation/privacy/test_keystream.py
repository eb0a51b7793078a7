# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hmac

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from aggregation.errors import PrivacyError
from aggregation.privacy.keystream import Keystream, new_seed

SEED = bytes(range(32))
KNOWN = ["0xe0cf08f0e0a678ce", "0x203508f56d272b6f", "0xaf34b3e7e306ca85"]


def test_the_cipher_beneath_gives_the_keystream_of_rfc_8439():
    # Appendix A.1, test vector 1: key, counter and nonce of zeros.
    stream = Cipher(algorithms.ChaCha20(bytes(32), bytes(16)), mode=None).encryptor()
    assert stream.update(bytes(16)).hex() == "76b8e0ada0f13d90405d6ae55386bd28"


def test_a_seed_and_a_use_give_the_same_words_everywhere():
    words = Keystream(SEED, "update").words(3)
    assert [hex(int(word)) for word in words] == KNOWN
    again = Keystream(SEED, "update")
    assert np.array_equal(np.concatenate([again.words(1), again.words(2)]), words)


def test_the_key_is_that_of_hkdf_written_out():
    # RFC 5869 with an empty salt: one block is enough for 32 bytes.
    extracted = hmac.digest(bytes(32), SEED, "sha256")
    key = hmac.digest(extracted, b"fedloom/noise/v1/update\x01", "sha256")
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    assert stream.update(bytes(24)) == Keystream(SEED, "update").words(3).astype("<u8").tobytes()


def test_another_use_or_seed_gives_other_words():
    first = Keystream(SEED, "update").words(100)
    for other in (Keystream(SEED, "count"), Keystream(new_seed(), "update")):
        assert not (other.words(100) == first).any()
    assert new_seed() != new_seed()


def test_bits_are_of_the_length_asked_for_and_fill_it():
    stream = Keystream(SEED, "bits")
    for count in (1, 7, 64, 65, 200):
        drawn = [stream.bits(count) for _ in range(200)]
        assert min(drawn) >= 0 and max(drawn).bit_length() == count


def test_integers_below_a_limit_are_all_drawn_and_alike():
    stream = Keystream(SEED, "below")
    drawn = [stream.below(5) for _ in range(5000)]
    assert max(abs(drawn.count(x) - 1000) for x in range(5)) < 5 * 29  # five deviations
    assert len(set(drawn)) == 5 and {stream.below(1) for _ in range(3)} == {0}


def test_bits_of_words_are_fair():
    words = Keystream(SEED, "fair").words(50_000)
    ones = [int((words >> np.uint64(bit) & np.uint64(1)).sum()) for bit in range(64)]
    assert max(abs(count - 25_000) for count in ones) < 5 * 112  # five deviations


@pytest.mark.parametrize("seed", [b"", bytes(16), bytes(33)])
def test_a_seed_of_another_length_is_refused(seed):
    with pytest.raises(PrivacyError, match="expected 32 bytes"):
        Keystream(seed, "update")
