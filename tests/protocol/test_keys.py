# SPDX-License-Identifier: Apache-2.0
"""P-384 keys and their files: whole, private, and of one kind."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from protocol.errors import SignatureError
from protocol.keys import (
    MAX_SIGNATURE_BYTES,
    key_fingerprint,
    load_key,
    load_public,
    new_key,
    private_openssh,
    private_pem,
    public_openssh,
    public_pem,
    save_key,
    sign,
    verify,
)
from protocol.owned_files import partial_files, read_private, write_whole

KEY = new_key()


def pem_of(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def test_saved_key_is_its_owners_alone_and_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    save_key(KEY, path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_key(path).public_key() == KEY.public_key()
    with pytest.raises(FileExistsError):
        save_key(new_key(), path)
    assert load_key(path).public_key() == KEY.public_key()
    assert [file.name for file in tmp_path.iterdir()] == ["key.pem"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_key_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key.pem"
    save_key(KEY, path)
    path.chmod(mode)
    with pytest.raises(SignatureError, match=rf"expected mode 600, found {mode:o}; run chmod 600"):
        load_key(path)


@pytest.mark.parametrize(("content", "words"), [
    (b"", "P-384 key in PEM"),
    (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "P-384 key in PEM"),
    (pem_of(ec.generate_private_key(ec.SECP256R1())), "another kind"),
    (b"x" * 20_000, "at most 16384 bytes"),
    (KEY.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                       serialization.BestAvailableEncryption(b"pass")), "unencrypted"),
], ids=["empty", "no key", "P-256", "long", "encrypted"])  # fmt: skip
def test_other_key_files_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "key.pem"
    write_whole(path, content)
    with pytest.raises(SignatureError, match=words):
        load_key(path)


def test_missing_key_and_link_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SignatureError, match="cannot be read"):
        load_key(tmp_path / "none")
    save_key(KEY, tmp_path / "key.pem")
    (tmp_path / "link").symlink_to(tmp_path / "key.pem")
    with pytest.raises(SignatureError, match="cannot be read"):
        load_key(tmp_path / "link")


def test_forms_of_a_key_are_the_same_key() -> None:
    public = KEY.public_key()
    assert load_public(public_pem(public)) == public
    assert serialization.load_pem_private_key(private_pem(KEY), None).public_key() == public
    # As flower-supernode and `flwr supernode register` read them.
    assert serialization.load_ssh_private_key(private_openssh(KEY), None).public_key() == public
    assert serialization.load_ssh_public_key(public_openssh(public)) == public
    der = public.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    assert key_fingerprint(public) == hashlib.sha256(der).hexdigest()


@pytest.mark.parametrize("pem", ["", "é", "-----BEGIN PUBLIC KEY-----\nAA==\n-----END"])
def test_other_public_keys_are_refused(pem: str) -> None:
    with pytest.raises(SignatureError, match="P-384"):
        load_public(pem)


def test_signature_is_of_one_message_and_key() -> None:
    signature = sign(b"message", KEY)
    assert len(signature) <= MAX_SIGNATURE_BYTES
    verify(b"message", signature, KEY.public_key())
    for message, key in ((b"other", KEY), (b"message", new_key())):
        with pytest.raises(SignatureError, match="does not belong"):
            verify(message, signature, key.public_key())
    with pytest.raises(SignatureError):
        verify(b"message", b"\0", KEY.public_key())


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_file_is_the_old_one_when_writing_breaks_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old")

    def crash(*arguments: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, step, crash)
    with pytest.raises(OSError, match="no space left"):
        write_whole(path, b"new")
    monkeypatch.undo()
    assert read_private(path, 10) == b"old"
    assert partial_files(path) == []
