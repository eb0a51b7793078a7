# SPDX-License-Identifier: Apache-2.0
"""Ed25519 keys and signatures: who made a bundle.

*Source* RFC 8032 (pure Ed25519, no pre-hash), by the `cryptography` package.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from protocol import _checks
from protocol.errors import SignatureError
from protocol.owned_files import read_private

SIGNATURE_BYTES: Final = 64
_PUBLIC_HEX: Final = 64
_MAX_KEY_FILE_BYTES: Final = 16 * 1024


def new_key() -> Ed25519PrivateKey:
    """A fresh private key from the system's randomness."""
    return Ed25519PrivateKey.generate()


def save_private_key(key: Ed25519PrivateKey, path: Path | str) -> None:
    """Writes PEM (PKCS#8, no passphrase) that only its owner may read.

    Raises: SignatureError if the file exists: a lost signing key cannot be had back.
    """
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise SignatureError(
            f"private key {path}: cannot be created: {error.strerror}; an existing key is never "
            "overwritten, move it away first"
        ) from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(pem)


def load_private_key(path: Path | str) -> Ed25519PrivateKey:
    """The key that `save_private_key` wrote. Raises: SignatureError, also if others may read it."""
    path = Path(path)
    pem = read_private(path, _MAX_KEY_FILE_BYTES)
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise SignatureError(
            f"private key {path}: expected an unencrypted Ed25519 key in PEM"
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise SignatureError(f"private key {path}: expected Ed25519, found another kind of key")
    return key


def public_key_hex(key: Ed25519PrivateKey) -> str:
    """The public half, 64 hex digits."""
    return key.public_key().public_bytes_raw().hex()


def sign(message: bytes, key: Ed25519PrivateKey) -> bytes:
    """64 bytes."""
    return key.sign(message)


def verify(message: bytes, signature: bytes, public: str) -> None:
    """Returns if `signature` is of `message` by the key `public` (hex). Raises: SignatureError."""
    _checks.hexadecimal("public key", public, _PUBLIC_HEX, _PUBLIC_HEX, SignatureError)
    if len(signature) != SIGNATURE_BYTES:
        raise SignatureError(f"signature: expected {SIGNATURE_BYTES} bytes, found {len(signature)}")
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(signature, message)
    except InvalidSignature:
        raise SignatureError(
            "signature: does not belong to this content and this key; fetch it again, "
            "and if that does not help, ask who signs for you"
        ) from None
