# SPDX-License-Identifier: Apache-2.0
"""The private certificate authority of one deployment, with P-384 keys throughout.

It signs two kinds of certificates: the coordinator's own, for its DNS names and addresses, and
devices', each for a name and for a week at most. There are no intermediates: whoever is told the
authority's fingerprint trusts what it signed, and nothing else.
"""

from __future__ import annotations

import ipaddress
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from coordinator.errors import AuthorityError
from protocol.errors import ManifestError, SignatureError
from protocol.files import read_small
from protocol.keys import (
    certificate_fingerprint,
    load_certificate,
    load_key,
    new_key,
    private_pem,
    require_p384,
    save_key,
    sign,
)
from protocol.limits import MAX_LABEL_LENGTH, MAX_PEM_LENGTH
from protocol.owned_files import PUBLIC, write_whole

DAY_S: Final = 86_400
MAX_DEVICE_LIFETIME_S: Final = 7 * DAY_S
KEY_FILE: Final = "authority.key"
CERTIFICATE_FILE: Final = "authority.pem"

_AUTHORITY_LIFETIME_S: Final = 3_650 * DAY_S
_SERVER_LIFETIME_S: Final = 395 * DAY_S  # with _EARLY_S below the 398 that TLS clients accept
# Devices judge the authority and the server by their own clocks: one that is a day behind can still
# connect, and is then told how far it is off. A device's certificate is judged by ours.
_EARLY_S: Final = 2 * DAY_S
_EARLY_DEVICE_S: Final = 300
_LABEL: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class CertificateFault(StrEnum):
    """What is wrong with a certificate that somebody showed."""

    MALFORMED = "it is no certificate in PEM"
    OTHER_AUTHORITY = "another authority signed it"
    NOT_A_DEVICE = "it is not for a device"
    NOT_YET_VALID = "it is not valid yet"
    EXPIRED = "it has expired"
    UNKNOWN = "it names no known device"
    WRONG_NAME = "its key is not that of the device that it names"
    REVOKED = "the device was revoked"


@dataclass(frozen=True, slots=True)
class Issued:
    """A private key and its certificate, PEM."""

    key: bytes
    certificate: bytes


class Authority:
    """Signs certificates, and tells those that it signed from others."""

    def __init__(
        self,
        key: ec.EllipticCurvePrivateKey,
        certificate: x509.Certificate,
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`now` is the clock, in seconds since 1970."""
        self._key = key
        self.certificate = certificate
        self._now = now

    @classmethod
    def create(cls, folder: Path, name: str, *, now: Callable[[], float] = time.time) -> Authority:
        """A new authority, in two files of `folder`; goes on where a crash cut it off.

        Raises: AuthorityError if there is one already, or it cannot be written.
        """
        path = folder / CERTIFICATE_FILE
        if path.exists():
            raise AuthorityError(
                f"{path}: there is an authority already, and devices trust it; move it away first"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / KEY_FILE).exists():
                save_key(new_key(), folder / KEY_FILE)
            key = load_key(folder / KEY_FILE)
            certificate = _self_signed(key, plain_label("name", name), now())
            write_whole(path, _pem(certificate), mode=PUBLIC, replace=False)
        except (OSError, SignatureError) as error:
            raise AuthorityError(f"{folder}: the authority cannot be made ({error})") from error
        return cls(key, certificate, now=now)

    @classmethod
    def open(cls, folder: Path, *, now: Callable[[], float] = time.time) -> Authority:
        """What `create` wrote. Raises: AuthorityError, also for a key that others may read."""
        path = folder / CERTIFICATE_FILE
        try:
            key = load_key(folder / KEY_FILE)
            certificate = load_certificate(read_small(path, MAX_PEM_LENGTH))
        except SignatureError as error:
            raise AuthorityError(str(error)) from error
        except (ManifestError, ValueError) as error:
            raise AuthorityError(
                f"{path}: expected the authority's certificate ({error}); restore both files from "
                "a backup, or make a new authority and enrol every device again"
            ) from error
        if certificate.public_key() != key.public_key():
            raise AuthorityError(
                f"{path}: expected the certificate of {KEY_FILE} beside it, found another's; "
                "restore both files from one backup"
            )
        return cls(key, certificate, now=now)

    @property
    def pem(self) -> str:
        """Its own certificate."""
        return _pem(self.certificate).decode("ascii")

    @property
    def fingerprint(self) -> str:
        """What operators tell users: SHA-256 of the certificate, 64 hex digits."""
        return certificate_fingerprint(self.certificate)

    def server(self, names: Sequence[str], *, lifetime_s: int = _SERVER_LIFETIME_S) -> Issued:
        """A fresh key with a certificate for DNS names and IP addresses.

        Raises: AuthorityError for no name, or one that is neither.
        """
        if not names:
            raise AuthorityError("server names: expected at least one DNS name or IP address")
        alternatives = [_general_name(name) for name in names]
        key = new_key()
        builder = (
            self._builder(names[0][:64], key.public_key(), _EARLY_S, _EARLY_S + lifetime_s)
            .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        )
        return Issued(private_pem(key), _pem(builder.sign(self._key, hashes.SHA384())))

    def device(
        self,
        name: str,
        key: ec.EllipticCurvePublicKey,
        *,
        lifetime_s: int = MAX_DEVICE_LIFETIME_S,
    ) -> x509.Certificate:
        """A certificate that says that the holder of `key` is the device called so.

        Raises: AuthorityError for a lifetime above MAX_DEVICE_LIFETIME_S.
        """
        if not 2 * _EARLY_DEVICE_S <= lifetime_s <= MAX_DEVICE_LIFETIME_S:
            raise AuthorityError(
                f"lifetime: expected {2 * _EARLY_DEVICE_S} to {MAX_DEVICE_LIFETIME_S} seconds, "
                f"found {lifetime_s}"
            )
        builder = self._builder(name, key, _EARLY_DEVICE_S, lifetime_s).add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        return builder.sign(self._key, hashes.SHA384())

    def sign(self, message: bytes) -> bytes:
        """A signature by the authority's own key."""
        return sign(message, self._key)

    def check(self, pem: str | bytes) -> tuple[str, ec.EllipticCurvePublicKey] | CertificateFault:
        """Name and key of a device's certificate that this authority signed and that is valid now.

        Whether the device is known, or revoked, the registry says.
        """
        try:
            raw = pem.encode("ascii") if isinstance(pem, str) else pem
            if len(raw) > MAX_PEM_LENGTH:
                return CertificateFault.MALFORMED
            certificate = load_certificate(raw)
        except ValueError:
            return CertificateFault.MALFORMED
        try:
            certificate.verify_directly_issued_by(self.certificate)
        except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
            return CertificateFault.OTHER_AUTHORITY
        # What follows was written by us: it is read as `device` wrote it.
        try:
            usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        except x509.ExtensionNotFound:
            return CertificateFault.NOT_A_DEVICE
        if list(usage) != [ExtendedKeyUsageOID.CLIENT_AUTH]:
            return CertificateFault.NOT_A_DEVICE
        now = self._now()
        if now < certificate.not_valid_before_utc.timestamp():
            return CertificateFault.NOT_YET_VALID
        if now > certificate.not_valid_after_utc.timestamp():
            return CertificateFault.EXPIRED
        (name,) = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return str(name.value), require_p384("certificate", certificate.public_key())

    def _builder(
        self, name: str, key: ec.EllipticCurvePublicKey, early_s: int, lifetime_s: int
    ) -> x509.CertificateBuilder:
        """A certificate that is no authority; `lifetime_s` counts from its start, `early_s` ago."""
        start = _moment(self._now() - early_s)
        own = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
        return (
            x509.CertificateBuilder()
            .subject_name(_named(name))
            .issuer_name(self.certificate.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(start + timedelta(seconds=lifetime_s))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(authority=False), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own.value),
                critical=False,
            )
        )


def plain_label(field: str, value: str) -> str:
    """A label for names of devices and authorities: letters, digits, `.`, `_`, `-`.

    Raises: AuthorityError.
    """
    if not _LABEL.fullmatch(value) or len(value) > MAX_LABEL_LENGTH:
        raise AuthorityError(
            f"{field}: expected 1 to {MAX_LABEL_LENGTH} letters, digits, . _ or -, the first a "
            f"letter or digit, found {value[:60]!r}"
        )
    return value


def _self_signed(key: ec.EllipticCurvePrivateKey, name: str, now: float) -> x509.Certificate:
    start = _moment(now - _EARLY_S)
    subject = _named(f"{name} authority")
    own = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + timedelta(seconds=_AUTHORITY_LIFETIME_S))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(authority=True), critical=True)
        .add_extension(own, critical=False)
        .sign(key, hashes.SHA384())
    )


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,  # an authority signs its answers, too
        key_cert_sign=authority,
        crl_sign=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        if not name:
            raise ValueError("it is empty")
        return x509.DNSName(name)
    except ValueError as error:
        raise AuthorityError(
            f"server names: expected DNS names in ASCII or IP addresses, found {name[:60]!r} "
            f"({error})"
        ) from None


def _named(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _moment(seconds: float) -> datetime:
    """Certificates know whole seconds."""
    return datetime.fromtimestamp(int(seconds), UTC)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
