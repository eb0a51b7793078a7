# SPDX-License-Identifier: Apache-2.0
"""A deployment's authority without a deployment, for tests and measurements over real TLS."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives import serialization

from coordinator.enrolment.authority import Authority, Issued
from protocol.keys import new_key, private_pem

if TYPE_CHECKING:
    import grpc


class ThrowAway:
    """`coordinator.enrolment.authority` in memory: it is gone with this object."""

    def __init__(self, *, now: Callable[[], float] = time.time) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self._authority = Authority.create(Path(folder), "throw-away", now=now)
        self.certificate = self._authority.pem.encode()

    def server(self, name: str = "server") -> Issued:
        """For a DNS name, or an address such as 127.0.0.1."""
        return self._authority.server((name,))

    def device(self, name: str) -> Issued:
        """For a member called so."""
        key = new_key()
        made = self._authority.device(name, key.public_key())
        return Issued(private_pem(key), made.public_bytes(serialization.Encoding.PEM))

    def server_credentials(self, name: str = "server") -> grpc.ServerCredentials:
        """Of a server that asks for its clients' certificates."""
        import grpc

        issued = self.server(name)
        return grpc.ssl_server_credentials(
            [(issued.key, issued.certificate)],
            root_certificates=self.certificate,
            require_client_auth=True,
        )

    def client_credentials(self, name: str) -> grpc.ChannelCredentials:
        """Of a member called so."""
        import grpc

        issued = self.device(name)
        return grpc.ssl_channel_credentials(self.certificate, issued.key, issued.certificate)
