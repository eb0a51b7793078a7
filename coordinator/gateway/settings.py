# SPDX-License-Identifier: Apache-2.0
"""What the gateway listens on, what it allows, and what its owner decides for it."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from coordinator.errors import GatewayError

Refuse = Callable[[bytes], str]
"""Why the device with this public key (PEM, as Flower has it registered) is refused; "" where it
is not. Asked before every request, on the event loop: it has to answer from memory."""

Exchange = Callable[[bytes], bytes]
"""A request's body to its answer's, in a thread of its own. It may raise RefusedError."""

FindBundle = Callable[[str], Path | None]
"""The folder of the bundle with this hash; None where there is none."""

Seen = Callable[[bytes, int, int], None]
"""Told of every request that was let in: public key, bytes received, bytes sent."""


def _nobody_saw(public_key: bytes, received: int, sent: int) -> None:
    """Where nobody counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """The decisions that are not the gateway's."""

    refuse: Refuse
    enroll: Exchange
    renew: Exchange
    find_bundle: FindBundle
    authority: bytes = b""
    """The certificate authority's certificate, PEM, for anybody: devices know its fingerprint."""
    seen: Seen = _nobody_saw


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayLimits:
    """Bounds on what the network may take of this machine; times in seconds.

    No half-sent request lives longer than `handshake_s + head_s`, or than `body_s` and the time
    that its bytes had at `body_bytes_per_s`.
    """

    fleet_bytes: int = 32 << 20  # body of a request to Flower, whose own chunks are 5 MiB
    enrolment_bytes: int = 16 << 10  # body of an enrolment
    head_bytes: int = 16 << 10  # request line and headers

    connections: int = 4_096  # open at once, those in the TLS handshake included
    connections_of_address: int = 2_048  # a whole hospital may come from one
    requests: int = 64  # at work at once; more are asked to come again
    requests_of_device: int = 8
    enrolments: int = 16  # at work at once, or waiting for their turn

    handshake_s: float = 8.0
    head_s: float = 8.0  # from a request's first byte, or from the handshake, to its body
    body_s: float = 15.0
    body_bytes_per_s: float = 8 << 10
    taking_s: float = 60.0  # that a device takes nothing of an answer
    idle_s: float = 15.0  # between two requests: longer than the 3 s between a SuperNode's polls
    closing_s: float = 2.0  # for the peer to agree that TLS ends
    upstream_s: float = 60.0  # SuperLink silent in an answer

    enrolments_burst: int = 10  # of one address
    enrolments_per_s: float = 0.5  # of one address, after the burst

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if getattr(self, name) <= 0:
                raise GatewayError(f"{name}: expected more than 0, found {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """Where the gateway listens, its certificate, and SuperLink behind it.

    Raises: GatewayError for a status or SuperLink host that is not loopback.
    """

    certificate: Path  # PEM, with its chain
    key: Path
    upstream_port: int
    upstream_authority: Path  # PEM: who signed SuperLink's certificate
    upstream_host: str = "127.0.0.1"
    host: str = "0.0.0.0"
    port: int = 8443
    status_host: str = "127.0.0.1"
    status_port: int = 9444
    status_token: str = ""
    """What a reader of metrics shows as a bearer token; "": nothing is asked for."""
    limits: GatewayLimits = GatewayLimits()

    def __post_init__(self) -> None:
        for name in ("status_host", "upstream_host"):
            host = getattr(self, name)
            try:
                local = ipaddress.ip_address(host).is_loopback
            except ValueError:
                local = False
            if not local:
                raise GatewayError(
                    f"{name}: expected a loopback address such as 127.0.0.1, found {host!r}; "
                    "whoever reaches that port needs no password"
                )
