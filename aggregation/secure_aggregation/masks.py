# SPDX-License-Identifier: Apache-2.0
"""Masks: uniform vectors over the integers modulo 2ᵏ, each from a key of 32 bytes.

The keystream of ChaCha20 with a nonce and a counter of zero, read as little-endian words of 16 bits
for k ≤ 16 and of 32 bits above. Words are added and subtracted with their own wrap-around; as 2ᵏ
divides 2¹⁶ and 2³², the lowest k bits of a sum of words are the sum modulo 2ᵏ, and the bits above
are dropped once, by `reduce`.

*Source* RFC 8439, section 2.4; masks as in Bonawitz et al., "Practical Secure Aggregation for
Privacy-Preserving Machine Learning", CCS 2017.
*Differs from source*: RFC 8439 counts from 1 where the first block makes an authenticator's key;
here there is none. The zero nonce is sound because a key makes one mask and nothing else: keys come
from `keys.py`, bound to round, attempt and purpose.

AES-256 in counter mode was measured at 1.25 times this speed where the processor has AES
instructions; many devices have none, and table look-ups tell keys to whoever watches the cache.

*Cost* 0.4 to 0.7 ms for 10⁶ words of 16 bits on one core with vector instructions, keystream and
addition, 0.9 ms of 32 bits; 256 KiB of memory whatever the length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from aggregation.errors import SecureSumError

KEY_BYTES: Final = 32
MAX_VALUES: Final = 1 << 32  # 16 GiB of keystream; the block counter of 32 bits lasts for 256

_BLOCK_BYTES: Final = 1 << 17
_ZEROS: Final = bytes(_BLOCK_BYTES)
_ORIGIN: Final = bytes(16)  # counter, then nonce


def add_mask(values: np.ndarray, key: bytes) -> None:
    """Adds the key's mask to `values`, in place.

    *Shapes* uint16 or uint32 [d], contiguous. Raises: SecureSumError for other values or another
    length of key.
    """
    for words, mask in _blocks(values, key):
        np.add(words, mask, out=words)


def subtract_mask(values: np.ndarray, key: bytes) -> None:
    """The inverse of `add_mask`, in place."""
    for words, mask in _blocks(values, key):
        np.subtract(words, mask, out=words)


def reduce(values: np.ndarray, bits: int) -> None:
    """Drops what lies above the lowest `bits` of every word, in place."""
    if bits < 8 * values.itemsize:
        np.bitwise_and(values, values.dtype.type((1 << bits) - 1), out=values)


def keystream(key: bytes) -> CipherContext:
    """ChaCha20 of this key from its first block. Raises: SecureSumError."""
    if len(key) != KEY_BYTES:
        raise SecureSumError(f"mask key: expected {KEY_BYTES} bytes, found {len(key)}")
    return Cipher(ChaCha20(key, _ORIGIN), mode=None).encryptor()


def _blocks(values: np.ndarray, key: bytes) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Views of the values with the mask's words for each; the words hold until the next."""
    if values.dtype not in (np.uint16, np.uint32) or values.ndim != 1:
        raise SecureSumError(
            f"values: expected a vector of uint16 or uint32, found {values.dtype} of "
            f"{values.ndim} dimensions"
        )
    if not values.flags.c_contiguous or values.size > MAX_VALUES:
        raise SecureSumError(f"values: expected at most {MAX_VALUES} that lie side by side")
    stream = keystream(key)
    buffer = bytearray(_BLOCK_BYTES)
    words = np.frombuffer(buffer, values.dtype.newbyteorder("<"))
    for start in range(0, values.size, words.size):
        part = values[start : start + words.size]
        stream.update_into(memoryview(_ZEROS)[: part.nbytes], buffer)
        yield part, words[: part.size]
