# SPDX-License-Identifier: Apache-2.0
"""Random words from a secret seed: the ChaCha20 keystream, for noise that protects someone.

Noise is only as secret as what it is drawn from, so that statistical generators (numpy's) are not
used: who sees some of their words computes all others. A seed is 32 bytes of the operating system's
randomness. Each use has a key of its own, HKDF-SHA256 of the seed and the use's name: the noise of
a round's updates says nothing of the noise of its count.

The same seed and use give the same words, which is what lets a round that a crash interrupted
release the same noise again instead of a second draw.

*Source* RFC 8439 (ChaCha20), RFC 5869 (HKDF). Block counter and nonce start at 0: a key is of one
stream and is never used for a second.
*Cost* about 1 GB/s.
"""

from __future__ import annotations

import secrets
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from aggregation.errors import PrivacyError

SEED_BYTES: Final = 32
_CONTEXT: Final = b"fedloom/noise/v1/"


def new_seed() -> bytes:
    """32 bytes that nobody can know."""
    return secrets.token_bytes(SEED_BYTES)


class Keystream:
    """The words of one seed and one use, from the first on; words are never given twice."""

    def __init__(self, seed: bytes, use: str) -> None:
        if len(seed) != SEED_BYTES:
            raise PrivacyError(f"seed: expected {SEED_BYTES} bytes, found {len(seed)}")
        info = _CONTEXT + use.encode()
        key = HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(seed)
        self._stream = Cipher(algorithms.ChaCha20(key, b"\0" * 16), mode=None).encryptor()

    def words(self, count: int) -> np.ndarray:
        """The next `count` words, uint64 [count], each uniform."""
        return np.frombuffer(self._stream.update(b"\0" * (8 * count)), dtype="<u8").astype(
            np.uint64
        )

    def bits(self, count: int) -> int:
        """An integer of `count` uniform bits, from words of its own."""
        words = -(-count // 64)
        drawn = int.from_bytes(self._stream.update(b"\0" * (8 * words)), "little")
        return drawn >> (64 * words - count)

    def below(self, limit: int) -> int:
        """A uniform integer of 0 to limit - 1."""
        bits = (limit - 1).bit_length()
        while (drawn := self.bits(bits) if bits else 0) >= limit:
            pass
        return drawn
