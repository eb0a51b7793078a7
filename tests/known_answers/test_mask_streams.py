# SPDX-License-Identifier: Apache-2.0
"""The stream that masks are made of, from the published vectors of ChaCha20."""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from aggregation.secure_aggregation.masks import add_mask, keystream

# RFC 8439, appendix A.1: keystream blocks for a nonce of zeros
ZERO_KEY_BLOCK_0 = bytes.fromhex(
    "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
)
ZERO_KEY_BLOCK_1 = bytes.fromhex(
    "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
    "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
)
KEY_1 = bytes(31) + b"\x01"
KEY_1_BLOCK_1 = bytes.fromhex(
    "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
    "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0"
)


def test_the_zero_key_s_blocks_are_those_of_rfc_8439() -> None:
    assert keystream(bytes(32)).update(bytes(128)) == ZERO_KEY_BLOCK_0 + ZERO_KEY_BLOCK_1


def test_the_second_block_of_another_key_is_that_of_rfc_8439() -> None:
    assert keystream(KEY_1).update(bytes(128))[64:] == KEY_1_BLOCK_1


def test_the_block_function_s_vector_of_rfc_8439_section_2_3_2() -> None:
    counter_and_nonce = bytes.fromhex("01000000000000090000004a00000000")
    stream = Cipher(ChaCha20(bytes(range(32)), counter_and_nonce), mode=None).encryptor()
    assert stream.update(bytes(64)).hex() == (
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"
    )


def test_a_mask_is_the_stream_in_little_endian_words() -> None:
    words = np.zeros(4, np.uint16)
    add_mask(words, bytes(32))
    assert words.tolist() == [0xB876, 0xADE0, 0xF1A0, 0x903D]
    wide = np.ones(2, np.uint32)
    add_mask(wide, bytes(32))
    assert wide.tolist() == [0xADE0B877, 0x903DF1A1]
