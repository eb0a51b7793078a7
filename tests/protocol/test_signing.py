# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from protocol import SignatureError
from protocol.signing import (
    load_private_key,
    new_key,
    public_key_hex,
    save_private_key,
    sign,
    verify,
)


def test_verify_passes_for_the_signed_bytes_alone():
    key, other = new_key(), new_key()
    signature = sign(b"message", key)
    verify(b"message", signature, public_key_hex(key))
    for message, sig, public in (
        (b"messagE", signature, public_key_hex(key)),
        (b"message", bytes(64), public_key_hex(key)),
        (b"message", signature[:-1], public_key_hex(key)),
        (b"message", signature + b"\0", public_key_hex(key)),
        (b"message", signature, public_key_hex(other)),
        (b"message", signature, public_key_hex(key)[:-2]),
        (b"message", signature, public_key_hex(key).upper()),
        (b"message", signature, "zz" * 32),
        (b"message", signature, "00" * 32),
    ):
        with pytest.raises(SignatureError):
            verify(message, sig, public)


def test_signatures_are_those_of_rfc_8032():
    # section 7.1, test 2
    secret = "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb"
    key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(secret))
    assert public_key_hex(key) == "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
    assert sign(b"\x72", key).hex() == (
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    )


def test_a_saved_key_is_private_and_loads_again(tmp_path):
    key = new_key()
    path = tmp_path / "key.pem"
    save_private_key(key, path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert public_key_hex(load_private_key(path)) == public_key_hex(key)
    with pytest.raises(SignatureError, match="never overwritten"):
        save_private_key(new_key(), path)
    assert public_key_hex(load_private_key(path)) == public_key_hex(key)


def test_loading_refuses_when_others_may_read_the_key(tmp_path):
    path = tmp_path / "key.pem"
    save_private_key(new_key(), path)
    path.chmod(0o640)
    with pytest.raises(SignatureError, match="found 640; run chmod 600"):
        load_private_key(path)


@pytest.mark.parametrize("content", ["missing", "text", "other kind", "encrypted"])
def test_loading_refuses_when_the_file_is_no_such_key(tmp_path, content):
    path = tmp_path / "key.pem"
    pkcs8 = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
    plain = serialization.NoEncryption()
    match content:
        case "text":
            path.write_text("not a key")
        case "other kind":
            path.write_bytes(X25519PrivateKey.generate().private_bytes(*pkcs8, plain))
        case "encrypted":
            secret = serialization.BestAvailableEncryption(b"secret")
            path.write_bytes(new_key().private_bytes(*pkcs8, secret))
    if content != "missing":
        path.chmod(0o600)
    with pytest.raises(SignatureError, match="private key"):
        load_private_key(path)
