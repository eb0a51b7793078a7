# SPDX-License-Identifier: Apache-2.0
"""Keys of one attempt at one secure sum: pairs, what two of them agree on, and sealed shares.

Every client draws two X25519 pairs for each attempt: one under which shares are sealed, one from
which masks come. A key that is used is HKDF-SHA256 of the agreed secret, with the attempt's digest
as salt (it covers job, round, nonce, plan and participants) and as info the purpose and both names,
each with its length before it. Names are in order: from and to for sealing, so that each direction
has a key of its own; ascending for masks, so that both ends have the same.

*Source* RFC 7748 (X25519), RFC 5869 (HKDF), RFC 8439 (ChaCha20-Poly1305), by the `cryptography`
package. A sealing key seals once, hence the nonce of zeros.

Who signs and who checks is the caller's: a `Signer` belongs to the enrolled device, a `Verifier`
knows the names that are enrolled and returns False for all others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from aggregation.errors import SecureMessageError, SecureSumError

KEY_BYTES: Final = 32
TAG_BYTES: Final = 16

Signer = Callable[[bytes], bytes]
"""A signature of a message, by this device's enrolled key."""
Verifier = Callable[[str, bytes, bytes], bool]
"""Whether the device of that name, enrolled and not revoked, signed the message so."""

SHARES: Final = b"shares"
PAIR_MASK: Final = b"pair mask"
SELF_MASK: Final = b"self mask"

_NONCE: Final = bytes(12)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyPair:
    """An X25519 pair, 32 bytes each; the secret is left out of what is printed."""

    secret: bytes = field(repr=False)
    public: bytes


def new_pair() -> KeyPair:
    """A fresh pair from the system's randomness."""
    secret = X25519PrivateKey.generate().private_bytes_raw()
    return KeyPair(secret=secret, public=public_of(secret))


def public_of(secret: bytes) -> bytes:
    """The public key of a secret of 32 bytes."""
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def agree(secret: bytes, public: bytes) -> bytes:
    """What both ends compute. Raises: SecureSumError for a public key of low order."""
    return agreements(secret)(public)


def agreements(secret: bytes) -> Callable[[bytes], bytes]:
    """`agree` of one secret with many public keys, at half the price of each."""
    own = X25519PrivateKey.from_private_bytes(secret)

    def with_public(public: bytes) -> bytes:
        try:
            return own.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError:
            raise SecureSumError(
                "public key: it gives the same secret with every other key"
            ) from None

    return with_public


def derive(agreed: bytes, *, attempt: bytes, purpose: bytes, names: tuple[str, ...]) -> bytes:
    """32 bytes for one purpose between those names in that order."""
    parts = [purpose, *(name.encode() for name in names)]
    info = b"fedloom secure sum" + b"".join(len(part).to_bytes(2, "big") + part for part in parts)
    return HKDF(hashes.SHA256(), KEY_BYTES, salt=attempt, info=info).derive(agreed)


def pair_mask_key(agreed: bytes, *, attempt: bytes, one: str, other: str) -> bytes:
    """The key of the mask between two clients, the same at both ends."""
    names = (min(one, other), max(one, other))
    return derive(agreed, attempt=attempt, purpose=PAIR_MASK, names=names)


def self_mask_key(seed: bytes, *, attempt: bytes, name: str) -> bytes:
    """The key of a client's own mask, from the seed that it shares out."""
    return derive(seed, attempt=attempt, purpose=SELF_MASK, names=(name,))


def commitment(seed: bytes, *, attempt: bytes, name: str) -> bytes:
    """What a client says of its seed before it is known: shares that do not open it are false."""
    return hashlib.sha256(b"fedloom secure sum seed\0" + attempt + seed + name.encode()).digest()


def seal(plaintext: bytes, agreed: bytes, *, attempt: bytes, sender: str, receiver: str) -> bytes:
    """Encrypted and authenticated from one to the other; TAG_BYTES longer."""
    key = derive(agreed, attempt=attempt, purpose=SHARES, names=(sender, receiver))
    return ChaCha20Poly1305(key).encrypt(_NONCE, plaintext, attempt)


def unseal(sealed: bytes, agreed: bytes, *, attempt: bytes, sender: str, receiver: str) -> bytes:
    """The inverse of `seal`. Raises: SecureMessageError if the bytes are not from that sender."""
    key = derive(agreed, attempt=attempt, purpose=SHARES, names=(sender, receiver))
    try:
        return ChaCha20Poly1305(key).decrypt(_NONCE, sealed, attempt)
    except InvalidTag:
        raise SecureMessageError(f"sealed shares: they are not from {sender!r}") from None
