# SPDX-License-Identifier: Apache-2.0
"""P-384 keys: who a device is, to TLS and to Flower alike, and who signs its certificates.

One curve throughout: Flower knows its nodes by such keys, so that a device needs one key only.

*Source* FIPS 186-5 (ECDSA with SHA-384), by the `cryptography` package.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from protocol.errors import SignatureError
from protocol.owned_files import read_private, write_whole

MAX_SIGNATURE_BYTES: Final = 104  # two integers of 48 bytes in DER
_MAX_KEY_FILE_BYTES: Final = 16 * 1024
_DIGEST: Final = hashes.SHA384()


def new_key() -> ec.EllipticCurvePrivateKey:
    """A fresh private key from the system's randomness."""
    return ec.generate_private_key(ec.SECP384R1())


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """PKCS#8, no passphrase: what TLS libraries read."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def private_openssh(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The form in which `flower-supernode --auth-supernode-private-key` reads it."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )


def load_certificate(pem: str | bytes) -> x509.Certificate:
    """A certificate in PEM. Raises: ValueError for anything else."""
    try:
        return x509.load_pem_x509_certificate(pem.encode() if isinstance(pem, str) else pem)
    except x509.InvalidVersion as error:  # the one that is no ValueError
        raise ValueError(str(error)) from None


def load_request(pem: str | bytes) -> x509.CertificateSigningRequest:
    """A request for a certificate in PEM. Raises: ValueError for anything else."""
    try:
        return x509.load_pem_x509_csr(pem.encode() if isinstance(pem, str) else pem)
    except x509.InvalidVersion as error:
        raise ValueError(str(error)) from None


def save_key(key: ec.EllipticCurvePrivateKey, path: Path) -> None:
    """Writes PEM that only its owner may read.

    Raises: FileExistsError: a key that is lost cannot be had back. OSError as `write_whole`.
    """
    write_whole(path, private_pem(key), replace=False)


def load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The key that `save_key` wrote. Raises: SignatureError, also if others may read it."""
    try:
        key = serialization.load_pem_private_key(
            read_private(path, _MAX_KEY_FILE_BYTES), password=None
        )
    except (TypeError, UnsupportedAlgorithm) as error:
        raise SignatureError(f"private key {path}: expected an unencrypted P-384 key") from error
    except ValueError as error:
        if isinstance(error, SignatureError):
            raise
        raise SignatureError(f"private key {path}: expected a P-384 key in PEM") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise SignatureError(f"private key {path}: expected P-384, found another kind of key")
    return key


def public_pem(key: ec.EllipticCurvePublicKey) -> str:
    """SubjectPublicKeyInfo, as it stands in Flower's headers."""
    raw = key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return raw.decode("ascii")


def public_openssh(key: ec.EllipticCurvePublicKey) -> bytes:
    """The form in which `flwr supernode register` reads it."""
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)


def load_public(pem: str) -> ec.EllipticCurvePublicKey:
    """The inverse of `public_pem`. Raises: SignatureError for any other text or kind of key."""
    try:
        key = serialization.load_pem_public_key(pem.encode("ascii"))
    except (ValueError, UnsupportedAlgorithm):
        raise SignatureError("public key: expected a P-384 key in PEM") from None
    return require_p384("public key", key)


def require_p384(field: str, key: object) -> ec.EllipticCurvePublicKey:
    """The key. Raises: SignatureError if it is of another kind."""
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise SignatureError(f"{field}: expected a P-384 key, found another kind")
    return key


def key_fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 of the key's SubjectPublicKeyInfo, 64 hex digits; a new certificate keeps it."""
    raw = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(raw).hexdigest()


def certificate_fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of the certificate in DER, 64 hex digits, as `openssl x509 -fingerprint` gives it."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def sign(message: bytes, key: ec.EllipticCurvePrivateKey) -> bytes:
    """At most MAX_SIGNATURE_BYTES, another signature each time."""
    return key.sign(message, ec.ECDSA(_DIGEST))


def verify(message: bytes, signature: bytes, key: ec.EllipticCurvePublicKey) -> None:
    """Returns if `signature` is of `message` by that key. Raises: SignatureError."""
    try:
        key.verify(signature, message, ec.ECDSA(_DIGEST))
    except InvalidSignature:
        raise SignatureError("signature: does not belong to this content and this key") from None


def credential_key(pem: str) -> ec.EllipticCurvePublicKey:
    """The public key of a certificate, or of a public key, in PEM. Raises: SignatureError."""
    if "BEGIN PUBLIC KEY" in pem:
        return load_public(pem)
    return require_p384("certificate", load_certificate(pem).public_key())


def verifier(credentials: Mapping[str, str]) -> Callable[[str, bytes, bytes], bool]:
    """Whether whoever shows a credential (PEM) under a name signed a message so; False for a name
    without one. The credentials themselves are believed. Raises: SignatureError."""
    known = {name: credential_key(pem) for name, pem in credentials.items()}

    def verified(name: str, message: bytes, signature: bytes) -> bool:
        if name not in known:
            return False
        try:
            verify(message, signature, known[name])
        except SignatureError:
            return False
        return True

    return verified
