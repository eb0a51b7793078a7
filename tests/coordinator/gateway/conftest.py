# SPDX-License-Identifier: Apache-2.0
"""A gateway on real sockets, with an upstream of a few lines in SuperLink's place."""

from __future__ import annotations

import asyncio
import datetime
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec

from coordinator.gateway.server import GatewayServer
from coordinator.gateway.settings import GatewayLimits, GatewaySettings, Hooks
from protocol.node_headers import node_headers, node_public_key
from simulations.throwaway import ThrowAway


class FakeSuperLink:
    """Echoes bodies over TLS, and remembers what reached it."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.received = 0
        self.broken_off = 0
        self.status = 200
        self.answer: bytes | None = None  # None: what was received
        self.wait_s = 0.0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.paths.append(scope["path"])
        self.headers.append({k.decode(): v.decode() for k, v in scope["headers"]})
        pieces = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.broken_off += 1
                return
            if self.answer is None:
                pieces.append(message["body"])
            self.received += len(message["body"])
            if not message["more_body"]:
                break
        await asyncio.sleep(self.wait_s)
        body = b"".join(pieces) if self.answer is None else self.answer
        headers = [
            (b"content-type", b"application/protobuf"),
            (b"content-length", str(len(body)).encode()),
            (b"flwr-version-incompatibility-message", b"old"),
            (b"x-inner", b"secret"),
        ]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})


@dataclass
class Device:
    """A node's key; the headers that it signs."""

    key: ec.EllipticCurvePrivateKey = field(
        default_factory=lambda: ec.generate_private_key(ec.SECP384R1())
    )

    @property
    def public_key(self) -> bytes:
        return node_public_key(self.key.public_key())

    def headers(self, *, later_s: float = 0.0) -> dict[str, str]:
        now = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=later_s)
        return node_headers(self.key, now)


@dataclass
class Running:
    """A gateway that is up."""

    port: int
    status_port: int
    authority: Path
    superlink: FakeSuperLink
    device: Device
    refused: dict[bytes, str]
    seen: list[tuple[bytes, int, int]]

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    @property
    def status_url(self) -> str:
        return f"http://127.0.0.1:{self.status_port}"

    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.authority))

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, verify=self.context(), trust_env=False, timeout=20)

    def connect(self, *, tls: bool = True) -> socket.socket:
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=40)
        if not tls:
            return plain
        return self.context().wrap_socket(plain, server_hostname="127.0.0.1")

    def eventually(self, check: Callable[[], bool], *, within_s: float = 10.0) -> bool:
        """Whether it comes true: what is counted is counted after the answer went out."""
        end = time.monotonic() + within_s
        while not check():
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True

    def metric(self, name: str) -> float:
        """The sample with this name and labels; 0 where there is none."""
        lines = httpx.get(self.status_url + "/metrics", trust_env=False).text.splitlines()
        values = [line.rpartition(" ")[2] for line in lines if line.startswith(name + " ")]
        return sum(map(float, values))


def no_bundle(name: str) -> None:
    return None


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ca.pem, and key and certificate of a server at 127.0.0.1."""
    folder = tmp_path_factory.mktemp("certificates")
    authority = ThrowAway()
    pair = authority.server("127.0.0.1")
    (folder / "ca.pem").write_bytes(authority.certificate)
    (folder / "server.pem").write_bytes(pair.certificate)
    (folder / "server.key").write_bytes(pair.key)
    return folder


class _Upstream(uvicorn.Server):
    """uvicorn's own server, for it is also what SuperLink runs on."""

    async def __aenter__(self) -> int:
        self.config.load()
        self.lifespan = self.config.lifespan_class(self.config)
        await self.startup()
        self.work = asyncio.create_task(self.main_loop())
        return int(self.servers[0].sockets[0].getsockname()[1])

    async def __aexit__(self, *_: object) -> None:
        self.work.cancel()
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await asyncio.sleep(0.01)


Serve = Callable[..., Running]


@pytest.fixture
def serve(certificates: Path) -> Iterator[Serve]:
    """`serve(limits, **hooks)` starts a gateway; it lasts as long as the test."""
    with ExitStack() as stack:

        def start(limits: GatewayLimits | None = None, **hooks: Any) -> Running:
            return stack.enter_context(_serving(certificates, limits or GatewayLimits(), hooks))

        yield start


@pytest.fixture(scope="module")
def _standing(certificates: Path) -> Iterator[Running]:
    limits = GatewayLimits(enrolments_burst=1_000)
    with _serving(certificates, limits, {}) as running:
        yield running


@pytest.fixture
def up(_standing: Running) -> Running:
    """A gateway that the tests of a module share, with the default limits; clean for each."""
    _standing.superlink.reset()
    _standing.refused.clear()
    _standing.seen.clear()
    return _standing


@contextmanager
def _serving(folder: Path, limits: GatewayLimits, hooks: dict[str, Any]) -> Iterator[Running]:
    up, loops = threading.Event(), []
    superlink, device = FakeSuperLink(), Device()
    refused: dict[bytes, str] = {}
    seen: list[tuple[bytes, int, int]] = []
    known = {device.public_key}

    def refuse(key: bytes) -> str:
        return refused.get(key, "") if key in known else "the device is not known"

    given: dict[str, Any] = {
        "refuse": refuse,
        "enroll": bytes.upper,
        "renew": bytes.lower,
        "find_bundle": no_bundle,
        "seen": lambda key, received, sent: seen.append((key, received, sent)),
    }
    made: list[Running] = []

    async def main() -> None:
        down = asyncio.Event()
        loops.append((asyncio.get_running_loop(), down))
        async with AsyncExitStack() as stack:
            config = uvicorn.Config(
                superlink, port=0, lifespan="off", ws="none", log_config=None,
                ssl_certfile=folder / "server.pem", ssl_keyfile=folder / "server.key",
            )  # fmt: skip
            upstream_port = await stack.enter_async_context(_Upstream(config))
            settings = GatewaySettings(
                certificate=folder / "server.pem", key=folder / "server.key",
                upstream_port=upstream_port, upstream_authority=folder / "ca.pem",
                host="127.0.0.1", port=0, status_port=0, limits=limits,
            )  # fmt: skip
            server = await stack.enter_async_context(
                GatewayServer(settings, Hooks(**(given | hooks)))
            )
            ca = folder / "ca.pem"
            made.append(
                Running(server.port, server.status_port, ca, superlink, device, refused, seen)
            )
            up.set()
            await down.wait()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    try:
        assert up.wait(20)
        # A request signed before the gateway's start would be asked to come again.
        time.sleep(0.01)
        yield made[0]
    finally:
        loop, down = loops[0]
        loop.call_soon_threadsafe(down.set)
        thread.join(20)
        assert not thread.is_alive()
