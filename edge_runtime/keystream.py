# SPDX-License-Identifier: Apache-2.0
"""Random words from a secret key: the ChaCha20 keystream, for draws that protect somebody.

Noise and samples are only as secret as what they are drawn from: numpy's generators can be computed
forwards and back from some of their output, and the seed of a plan is known to the coordinator. A
device's key is 32 bytes of the operating system's randomness, used for one round and forgotten.

*Source* RFC 8439, section 2.4; block counter and nonce start at 0, a key is of one stream. Normal
values by Box and Muller 1958 ("A Note on the Generation of Random Normal Deviates"), in float64 of
two words of 64 bits each pair: none is beyond 9.5 deviations, where about 1e-21 of them would be.
*Cost* some 30 ns a normal value.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Callable
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

KEY_BYTES: Final = 32
_WORD_BYTES: Final = 8
_UNIT: Final = 2.0**-64


class Keystream:
    """The words of one key, from the first on; none is given twice."""

    def __init__(self, key: bytes) -> None:
        """Raises: ValueError for a key that is not 32 bytes."""
        if len(key) != KEY_BYTES:
            raise ValueError(f"key: expected {KEY_BYTES} bytes, found {len(key)}")
        self._cipher = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()

    def words(self, count: int) -> np.ndarray:
        """The next words, uint64 [count], each uniform."""
        stream = self._cipher.update(bytes(_WORD_BYTES * count))
        return np.frombuffer(stream, "<u8").astype(np.uint64)

    def normals(self, count: int) -> np.ndarray:
        """Standard normal values, float32 [count]."""
        pairs = -(-count // 2)
        first, second = self.words(2 * pairs).reshape(2, pairs).astype(np.float64)
        # Half a unit keeps the logarithm's argument above 0.
        radius = np.sqrt(-2.0 * np.log((first + 0.5) * _UNIT))
        angle = (2.0 * math.pi * _UNIT) * second
        values = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        return values[:count].astype(np.float32)


OpenKeystream = Callable[[int], Keystream]
"""From a plan's seed to the stream of one round's draws."""


def secret_keystream(seed: int) -> Keystream:
    """A stream that nobody knows. The plan's seed, which the coordinator chose, has no part in
    it."""
    del seed
    return Keystream(secrets.token_bytes(KEY_BYTES))


def repeatable_keystream(seed: int) -> Keystream:
    """The stream of a seed, for simulations and tests: who knows the seed can take its noise off
    again."""
    return Keystream(hashlib.sha256(b"fedloom/repeatable/v1/%d" % seed).digest())
