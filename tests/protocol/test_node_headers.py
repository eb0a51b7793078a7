# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import base64
import datetime
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from protocol.errors import SignatureError
from protocol.node_headers import (
    PUBLIC_KEY,
    SIGNATURE,
    TIMESTAMP,
    node_headers,
    node_public_key,
    read_claim,
    verify_claim,
)

KEY = ec.generate_private_key(ec.SECP384R1())
NOW = datetime.datetime(2026, 5, 6, 7, 8, 9, 123456, datetime.UTC)
HEADERS = node_headers(KEY, NOW)


def raw(headers: dict[str, Any]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), str(value).encode("latin-1")) for name, value in headers.items()]


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_claim_is_read_and_verified(curve: ec.EllipticCurve) -> None:
    key = ec.generate_private_key(curve)
    claim = read_claim([(b"host", b"x"), *raw(node_headers(key, NOW))])
    assert claim.public_key == node_public_key(key.public_key())
    assert claim.signed_at == pytest.approx(NOW.timestamp(), abs=1e-6)
    verify_claim(claim, NOW.timestamp())


def test_flower_reads_our_headers_and_we_read_flowers() -> None:
    asymmetric = pytest.importorskip("flwr.supercore.primitives.asymmetric")
    claim = read_claim(raw(HEADERS))
    assert claim.public_key == asymmetric.public_key_to_bytes(KEY.public_key())
    public = asymmetric.bytes_to_public_key(claim.public_key)
    assert asymmetric.verify_signature(public, claim.timestamp.encode(), claim.signature)
    theirs = asymmetric.sign_message(KEY, HEADERS[TIMESTAMP].encode())
    signed = HEADERS | {SIGNATURE: base64.b64encode(theirs).decode()}
    verify_claim(read_claim(raw(signed)), NOW.timestamp())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({SIGNATURE: "!"}, "expected base64"),
        ({TIMESTAMP: "yesterday"}, "expected a time in ISO 8601"),
        ({TIMESTAMP: "2026-05-06T07:08:09"}, "with its zone"),
        ({TIMESTAMP: "x" * 2_000}, "at most 1024 ASCII"),
        ({TIMESTAMP: "ä"}, "at most 1024 ASCII"),
    ],
)
def test_header_that_cannot_be_is_refused(change: dict[str, str], words: str) -> None:
    with pytest.raises(SignatureError, match=words):
        read_claim(raw(HEADERS | change))


def test_header_that_is_missing_or_there_twice_is_refused() -> None:
    for name in HEADERS:
        others = {key: value for key, value in HEADERS.items() if key != name}
        with pytest.raises(SignatureError, match=f"expected the header {name}, found none"):
            read_claim(raw(others))
        with pytest.raises(SignatureError, match=f"{name}: expected once, found twice"):
            read_claim(raw(HEADERS) + raw({name: HEADERS[name]}))


def changed(**values: str) -> Any:
    return read_claim(raw(HEADERS | {f"flwr-{k.replace('_', '-')}": v for k, v in values.items()}))


def test_signature_has_to_be_of_this_key_and_time() -> None:
    at = NOW.timestamp()
    other = node_headers(ec.generate_private_key(ec.SECP384R1()), NOW)
    for claim in (
        changed(timestamp="2026-05-06T07:08:10+00:00"),
        changed(public_key=other[PUBLIC_KEY]),
        changed(signature=other[SIGNATURE]),
        changed(signature=""),
    ):
        with pytest.raises(SignatureError, match="not this key's signature"):
            verify_claim(claim, at)


def test_key_has_to_be_a_nist_curve_in_its_one_spelling() -> None:
    def encoded(pem: bytes) -> str:
        return base64.b64encode(pem).decode()

    pem = node_public_key(KEY.public_key())
    with pytest.raises(SignatureError, match="one PEM spelling"):
        verify_claim(changed(public_key=encoded(pem + b"\n")), NOW.timestamp())
    with pytest.raises(SignatureError, match="expected a public key in PEM"):
        verify_claim(changed(public_key=encoded(b"nothing")), NOW.timestamp())
    koblitz = ec.generate_private_key(ec.SECP256K1()).public_key()
    with pytest.raises(SignatureError, match="P-256, P-384 or P-521"):
        verify_claim(changed(public_key=encoded(node_public_key(koblitz))), NOW.timestamp())


@pytest.mark.parametrize(
    ("later_s", "words"),
    [(304, ""), (306, "clock off by 306 s: the device is behind"), (-4, ""),
     (-6, "clock off by 6 s: the device is ahead"), (86_400, "clock off by 86400 s")],
)  # fmt: skip
def test_claim_is_good_for_as_long_as_flower_takes_it(later_s: int, words: str) -> None:
    claim = read_claim(raw(HEADERS))
    if not words:
        verify_claim(claim, NOW.timestamp() + later_s)
        return
    with pytest.raises(SignatureError, match=words):
        verify_claim(claim, NOW.timestamp() + later_s)


def test_time_without_a_zone_is_not_signed() -> None:
    with pytest.raises(ValueError, match="expected a time with its zone"):
        node_headers(KEY, NOW.replace(tzinfo=None))


def test_private_key_is_not_in_the_headers() -> None:
    private = KEY.private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    assert private[-60:] not in base64.b64decode(HEADERS[PUBLIC_KEY])
