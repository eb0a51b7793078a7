# SPDX-License-Identifier: Apache-2.0
"""A certificate authority for an hour, for tests and measurements over real TLS on one machine."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import grpc


@dataclass(frozen=True, slots=True)
class Pair:
    """A private key and its certificate, PEM."""

    key: bytes
    certificate: bytes


class Authority:
    """Signs certificates whose common name says who somebody is."""

    def __init__(self) -> None:
        from cryptography.hazmat.primitives.asymmetric import ec

        self._key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = self._signed("authority", self._key, is_authority=True)

    def pair(self, name: str) -> Pair:
        """A fresh key of somebody called so, or of a server at an address such as 127.0.0.1."""
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        raw = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        return Pair(raw, self._signed(name, key, is_authority=False))

    def server_credentials(self, name: str = "server") -> grpc.ServerCredentials:
        """Of a server that asks for its clients' certificates."""
        import grpc

        pair = self.pair(name)
        return grpc.ssl_server_credentials(
            [(pair.key, pair.certificate)],
            root_certificates=self.certificate,
            require_client_auth=True,
        )

    def client_credentials(self, name: str) -> grpc.ChannelCredentials:
        """Of a client called so."""
        import grpc

        pair = self.pair(name)
        return grpc.ssl_channel_credentials(self.certificate, pair.key, pair.certificate)

    def _signed(self, name: str, key: Any, *, is_authority: bool) -> bytes:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.x509.oid import NameOID

        def named(text: str) -> x509.Name:
            return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

        def reached_as(text: str) -> x509.GeneralName:
            try:
                return x509.IPAddress(ipaddress.ip_address(text))
            except ValueError:
                return x509.DNSName(text)

        now = datetime.datetime.now(datetime.UTC)
        made = (
            x509.CertificateBuilder()
            .subject_name(named(name))
            .issuer_name(named("authority"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([reached_as(name)]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return made.public_bytes(serialization.Encoding.PEM)
