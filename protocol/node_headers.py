# SPDX-License-Identifier: Apache-2.0
"""Who sends an HTTP request: the headers by which Flower knows a node.

Three headers: the node's public key, the time, and the key's signature of that time. Flower's
SuperNode sends them with every request of its own; what a device asks beside Flower carries the
same ones. The body is not signed, so whoever reads these headers must take a time of a key once.

*Source* Flower 1.41, `flwr.supernode.node_auth_http_interceptor`.
"""

from __future__ import annotations

import base64
import binascii
import datetime
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from protocol.errors import SignatureError

PUBLIC_KEY: Final = "flwr-public-key"
TIMESTAMP: Final = "flwr-timestamp"
SIGNATURE: Final = "flwr-signature"

MAX_AGE_S: Final = 305.0  # Flower's 300 s, and 5 s for clocks that differ
MAX_AHEAD_S: Final = 5.0

_MAX_VALUE: Final = 1_024  # characters; the longest honest one is the key of P-521, 360
_CURVES: Final = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)


@dataclass(frozen=True, slots=True)
class NodeClaim:
    """What a request says about its sender; nothing of it is proven before `verify_claim`."""

    public_key: bytes  # PEM
    timestamp: str  # as it was signed
    signature: bytes
    signed_at: float  # seconds since 1970


def node_public_key(key: ec.EllipticCurvePublicKey) -> bytes:
    """A node's public key as it is registered and sent: PEM, the one spelling of it."""
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def node_headers(key: ec.EllipticCurvePrivateKey, now: datetime.datetime) -> dict[str, str]:
    """The headers of one request at `now`, which has to name its time zone."""
    if now.tzinfo is None:
        raise ValueError("expected a time with its zone, found one without; use datetime.UTC")
    timestamp = now.isoformat()
    signature = key.sign(timestamp.encode("ascii"), ec.ECDSA(hashes.SHA256()))
    public = node_public_key(key.public_key())
    return {
        PUBLIC_KEY: base64.b64encode(public).decode("ascii"),
        TIMESTAMP: timestamp,
        SIGNATURE: base64.b64encode(signature).decode("ascii"),
    }


def read_claim(headers: Iterable[tuple[bytes, bytes]]) -> NodeClaim:
    """The claim in a request's headers, their names in lower case.

    Raises: SignatureError where a header is missing, there twice or no such value.
    """
    wanted = (PUBLIC_KEY, TIMESTAMP, SIGNATURE)
    found: dict[str, str] = {}
    for raw_name, raw_value in headers:
        name = raw_name.decode("latin-1")
        if name not in wanted:
            continue
        if name in found:
            raise SignatureError(f"{name}: expected once, found twice")
        if len(raw_value) > _MAX_VALUE or not raw_value.isascii():
            raise SignatureError(f"{name}: expected at most {_MAX_VALUE} ASCII characters")
        found[name] = raw_value.decode("ascii")
    if missing := [name for name in wanted if name not in found]:
        raise SignatureError(f"expected the header {missing[0]}, found none")
    try:
        public_key = base64.b64decode(found[PUBLIC_KEY], validate=True)
        signature = base64.b64decode(found[SIGNATURE], validate=True)
    except binascii.Error:
        raise SignatureError(f"{PUBLIC_KEY}, {SIGNATURE}: expected base64") from None
    try:
        moment = datetime.datetime.fromisoformat(found[TIMESTAMP])
    except ValueError:
        raise SignatureError(f"{TIMESTAMP}: expected a time in ISO 8601") from None
    if moment.tzinfo is None:
        raise SignatureError(f"{TIMESTAMP}: expected a time with its zone")
    return NodeClaim(public_key, found[TIMESTAMP], signature, moment.timestamp())


def verify_claim(claim: NodeClaim, now: float) -> None:
    """That the claim's key signed its time, and did so just now (seconds since 1970).

    Raises: SignatureError.
    """
    try:
        key = serialization.load_pem_public_key(claim.public_key)
    except (ValueError, UnsupportedAlgorithm):
        raise SignatureError(f"{PUBLIC_KEY}: expected a public key in PEM") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, _CURVES):
        raise SignatureError(f"{PUBLIC_KEY}: expected a key of P-256, P-384 or P-521")
    if node_public_key(key) != claim.public_key:
        raise SignatureError(f"{PUBLIC_KEY}: expected the one PEM spelling of the key")
    try:
        key.verify(claim.signature, claim.timestamp.encode("ascii"), ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise SignatureError(f"{SIGNATURE}: it is not this key's signature of the time") from None
    # After the signature: only the holder of the key is told how far off its clock is.
    off = claim.signed_at - now
    if not -MAX_AGE_S < off < MAX_AHEAD_S:
        word = "ahead" if off > 0 else "behind"
        raise SignatureError(
            f"clock off by {abs(off):.0f} s: the device is {word} of the coordinator; "
            "set its clock and try again"
        )
