# SPDX-License-Identifier: Apache-2.0
"""Certificates: which are made, which are taken, and that TLS agrees."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import NameOID

from coordinator.enrolment.authority import (
    CERTIFICATE_FILE,
    DAY_S,
    KEY_FILE,
    MAX_DEVICE_LIFETIME_S,
    Authority,
    CertificateFault,
)
from coordinator.errors import AuthorityError
from protocol.keys import new_key, private_pem, save_key

KEY = new_key()
BAD_LABELS = ["", "-a", ".a", "a b", "é", "a/b", "a" * 41, "a\n"]


def pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def test_authority_is_read_as_it_was_written(tmp_path: Path, clock: Callable[[], float]) -> None:
    made = Authority.create(tmp_path / "ca", "hospital", now=clock)
    assert (tmp_path / "ca" / KEY_FILE).stat().st_mode & 0o777 == 0o600
    read = Authority.open(tmp_path / "ca", now=clock)
    assert read.pem == made.pem and len(read.fingerprint) == 64
    assert isinstance(read.check(pem(made.device("a", KEY.public_key()))), tuple)
    with pytest.raises(AuthorityError, match="there is an authority already"):
        Authority.create(tmp_path / "ca", "hospital", now=clock)


def test_creation_goes_on_with_the_key_of_one_that_was_cut_off(
    tmp_path: Path, clock: Callable[[], float]
) -> None:
    save_key(KEY, tmp_path / KEY_FILE)
    made = Authority.create(tmp_path, "hospital", now=clock)
    assert made.certificate.public_key() == KEY.public_key()


def test_key_that_others_can_read_is_refused(tmp_path: Path, clock: Callable[[], float]) -> None:
    Authority.create(tmp_path, "hospital", now=clock)
    (tmp_path / KEY_FILE).chmod(0o640)
    with pytest.raises(AuthorityError, match="expected mode 600, found 640"):
        Authority.open(tmp_path, now=clock)


@pytest.mark.parametrize("content", [None, b"", b"x" * 9_000])
def test_missing_or_spoilt_certificate_is_said_so(
    tmp_path: Path, clock: Callable[[], float], content: bytes | None
) -> None:
    Authority.create(tmp_path, "hospital", now=clock)
    path = tmp_path / CERTIFICATE_FILE
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(AuthorityError, match="expected the authority's certificate"):
        Authority.open(tmp_path, now=clock)


def test_certificate_of_another_key_is_said_so(tmp_path: Path, clock: Callable[[], float]) -> None:
    Authority.create(tmp_path / "a", "a", now=clock)
    Authority.create(tmp_path / "b", "b", now=clock)
    (tmp_path / "a" / CERTIFICATE_FILE).write_bytes(
        (tmp_path / "b" / CERTIFICATE_FILE).read_bytes()
    )
    with pytest.raises(AuthorityError, match="restore both files from one backup"):
        Authority.open(tmp_path / "a", now=clock)


@pytest.mark.parametrize("name", BAD_LABELS)
def test_authority_has_a_plain_name(tmp_path: Path, name: str, clock: Any) -> None:
    with pytest.raises(AuthorityError, match="name: expected 1 to 40 letters"):
        Authority.create(tmp_path, name, now=clock)


def test_device_certificate_says_who_and_for_how_long(desk: Any) -> None:
    made = desk.authority.device("cam-1", KEY.public_key())
    life = made.not_valid_after_utc - made.not_valid_before_utc
    assert life.total_seconds() == MAX_DEVICE_LIFETIME_S == 7 * DAY_S
    assert made.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "cam-1"
    assert desk.authority.check(pem(made)) == ("cam-1", KEY.public_key())
    for lifetime in (MAX_DEVICE_LIFETIME_S + 1, 0):
        with pytest.raises(AuthorityError, match="lifetime: expected 600 to 604800 seconds"):
            desk.authority.device("cam-1", KEY.public_key(), lifetime_s=lifetime)


def test_certificate_is_taken_while_it_lasts(desk: Any) -> None:
    text = pem(desk.authority.device("a", KEY.public_key()))
    desk.clock += -301
    assert desk.authority.check(text) is CertificateFault.NOT_YET_VALID
    desk.clock += MAX_DEVICE_LIFETIME_S
    assert isinstance(desk.authority.check(text), tuple)
    desk.clock += 2
    assert desk.authority.check(text) is CertificateFault.EXPIRED


def test_other_certificates_are_refused(desk: Any, tmp_path: Path) -> None:
    other = Authority.create(tmp_path / "other", "hospital", now=desk.clock)
    check = desk.authority.check
    assert check(pem(other.device("a", KEY.public_key()))) is CertificateFault.OTHER_AUTHORITY
    assert check(other.pem) is CertificateFault.OTHER_AUTHORITY
    assert check(desk.authority.pem) is CertificateFault.NOT_A_DEVICE
    assert check(desk.authority.server(["localhost"]).certificate) is CertificateFault.NOT_A_DEVICE
    for junk in ("", "é", b"\xff", b"x" * 9_000, pem(desk.authority.certificate)[:-60]):
        assert check(junk) is CertificateFault.MALFORMED


def test_changed_certificate_is_refused(desk: Any) -> None:
    made = desk.authority.device("cam-1", KEY.public_key())
    raw = made.public_bytes(serialization.Encoding.DER).replace(b"cam-1", b"cam-2")
    text = pem(x509.load_der_x509_certificate(raw))
    assert desk.authority.check(text) is CertificateFault.OTHER_AUTHORITY


def test_server_certificate_has_names_and_addresses(desk: Any) -> None:
    issued = desk.authority.server(["fl.example.org", "127.0.0.1", "::1"])
    made = x509.load_pem_x509_certificate(issued.certificate)
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fl.example.org"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "::1"]
    assert made.not_valid_before_utc.timestamp() == desk.clock() - 2 * DAY_S
    assert made.not_valid_after_utc.timestamp() == desk.clock() + 395 * DAY_S
    for names in ([], [""], ["é.org"]):
        with pytest.raises(AuthorityError, match="server names: expected"):
            desk.authority.server(names)


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> ssl.SSLObject:
    """TLS in memory; the server's end, after both have seen the other's certificate."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(down, up, server_hostname=name),
        server.wrap_bio(up, down, server_side=True),
    )
    waiting = set(ends)
    for _ in range(6):
        for end in ends:
            if end in waiting:
                try:
                    end.do_handshake()
                    waiting.discard(end)
                except ssl.SSLWantReadError:
                    pass
    assert not waiting
    return ends[1]


def contexts(
    tmp_path: Path, server: Authority, client: Authority, names: list[str]
) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server that asks for certificates of its authority, and a device of `client`'s."""
    issued = server.server(names)
    (tmp_path / "server.pem").write_bytes(issued.key + issued.certificate)
    device = client.device("cam-1", KEY.public_key())
    (tmp_path / "device.pem").write_bytes(private_pem(KEY) + pem(device).encode())
    made = []
    for side, own in ((ssl.PROTOCOL_TLS_SERVER, "server"), (ssl.PROTOCOL_TLS_CLIENT, "device")):
        context = ssl.SSLContext(side)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        context.load_verify_locations(cadata=server.pem)
        context.load_cert_chain(tmp_path / f"{own}.pem")
        made.append(context)
    return made[0], made[1]


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
def test_tls_of_both_sides_is_content_with_the_certificates(tmp_path: Path, name: str) -> None:
    authority = Authority.create(tmp_path, "hospital", now=time.time)
    server, client = contexts(tmp_path, authority, authority, ["localhost", "127.0.0.1"])
    seen = handshake(server, client, name).getpeercert()
    assert seen is not None and seen["subject"] == ((("commonName", "cam-1"),),)


def test_tls_refuses_another_name_and_another_authority(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "a", "hospital", now=time.time)
    other = Authority.create(tmp_path / "b", "hospital", now=time.time)
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(*contexts(tmp_path, authority, authority, ["localhost"]), "example.org")
    with pytest.raises(ssl.SSLError, match="certificate verify failed"):
        handshake(*contexts(tmp_path, authority, other, ["localhost"]), "localhost")
