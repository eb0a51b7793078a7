# SPDX-License-Identifier: Apache-2.0
"""The listening sockets, and a watch over every connection.

uvicorn 0.49 bounds neither the TLS handshake (asyncio's 60 s apply), nor the time to a request's
last header, nor the time to its body's last byte: a connection that stops in the middle of one
stays for ever. So connections are accepted here, one at a time, with a bounded handshake, and are
looked at twice a second: who has not got on by then is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import resource
import signal
import socket
import ssl
from collections import Counter
from collections.abc import Callable
from typing import Final

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from coordinator.errors import GatewayError
from coordinator.gateway.app import GatewayApp
from coordinator.gateway.forward import Upstream
from coordinator.gateway.metrics import Metrics, StatusApp
from coordinator.gateway.settings import GatewayLimits, GatewaySettings, Hooks

_LOOK_S: Final = 0.5
_BACKLOG: Final = 1_024  # connections that the kernel keeps until they are accepted
_SHUTDOWN_S: Final = 5  # for requests at work when the gateway stops

_log = logging.getLogger(__name__)


class _Connection(H11Protocol):
    """uvicorn's protocol, and since when it waits for what."""

    head_since: float | None = None  # None: no request has begun, or its headers are complete
    received = 0  # bytes of the request at work
    body_waited = 0.0
    taking_waited = 0.0
    leave: Callable[[], None] | None = None
    """Gives back the connection's place."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.head_since = self.loop.time()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.leave is not None:
            self.leave()

    def data_received(self, data: bytes) -> None:
        if self.head_since is None and not self.answering:
            self.head_since = self.loop.time()
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self.received, self.body_waited = 0, 0.0
        if self.answering:
            self.head_since = None
            self.received += len(data)

    @property
    def answering(self) -> bool:
        """Whether a request's headers are here and its answer is not complete."""
        return self.cycle is not None and not self.cycle.response_complete

    def late(self, limits: GatewayLimits, passed_s: float) -> str:
        """What the peer is late with, `passed_s` after the last look; "" where it gets on."""
        if self.head_since is not None:
            return "head" if self.loop.time() - self.head_since > limits.head_s else ""
        if not (self.answering and self.cycle.more_body):
            self.body_waited = 0.0
        elif not self.flow.read_paused:
            # Only the time in which bytes could have come: a slow SuperLink is not the device's.
            self.body_waited += passed_s
            if self.body_waited > limits.body_s + self.received / limits.body_bytes_per_s:
                return "body"
        self.taking_waited = self.taking_waited + passed_s if self.flow.write_paused else 0.0
        return "answer" if self.taking_waited > limits.taking_s else ""


class _Server(uvicorn.Server):
    """uvicorn's server on a socket of ours, where connections are accepted one at a time."""

    def __init__(
        self,
        config: uvicorn.Config,
        listening: socket.socket,
        tls: ssl.SSLContext | None,
        limits: GatewayLimits,
        metrics: Metrics,
    ) -> None:
        super().__init__(config)
        self._listening = listening
        self._tls = tls
        self._limits = limits
        self._metrics = metrics
        self._opening: set[asyncio.Task[None]] = set()
        self._of_address: Counter[str] = Counter()
        self.servers = []

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self._listening.getsockname()[1])

    async def begin(self) -> None:
        """Listens from now on."""
        self.config.load()
        self.lifespan = self.config.lifespan_class(self.config)
        self._listening.listen(_BACKLOG)
        self._work = [
            asyncio.create_task(work) for work in (self._accept(), self._watch(), self.main_loop())
        ]
        self.started = True

    async def end(self) -> None:
        """Stops listening, lets requests finish for a while, and closes what is left."""
        for task in (*self._work, *self._opening):
            task.cancel()
        await asyncio.gather(*self._work, *self._opening, return_exceptions=True)
        self._listening.close()
        await self.shutdown()
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await asyncio.sleep(0)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, peer = await loop.sock_accept(self._listening)
            except OSError as error:
                # Most often no file descriptor is left: some are freed before the next try.
                _log.error("cannot accept a connection: %s", error)
                await asyncio.sleep(0.5)
                continue
            task = asyncio.create_task(self._open(accepted, str(peer[0])))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)
            # One pass of the loop for each newcomer, so that a crowd of them takes turns with
            # those who are being served.
            await asyncio.sleep(0)

    async def _open(self, accepted: socket.socket, address: str) -> None:
        """The handshake, and the connection's place until it is lost."""
        limits = self._limits
        if (
            self._of_address.total() >= limits.connections
            or self._of_address[address] >= limits.connections_of_address
        ):
            self._metrics.closed.labels("crowd").inc()
            accepted.close()
            return
        loop = asyncio.get_running_loop()
        self._enter(address)
        try:
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await loop.connect_accepted_socket(
                lambda: self._connection(loop, address),
                accepted,
                ssl=self._tls,
                ssl_handshake_timeout=limits.handshake_s if self._tls else None,
                ssl_shutdown_timeout=limits.closing_s if self._tls else None,
            )
        except OSError as error:
            # asyncio aborts a handshake that takes too long; the rest did not speak TLS with us.
            late = isinstance(error, ConnectionAbortedError)
            self._metrics.closed.labels("handshake" if late else "tls").inc()
            accepted.close()
            self._leave(address)

    def _connection(self, loop: asyncio.AbstractEventLoop, address: str) -> _Connection:
        made = _Connection(self.config, self.server_state, {}, loop)
        made.leave = functools.partial(self._leave, address)
        return made

    def _enter(self, address: str) -> None:
        self._of_address[address] += 1
        self._metrics.connections.inc()

    def _leave(self, address: str) -> None:
        self._metrics.connections.dec()
        self._of_address[address] -= 1
        if not self._of_address[address]:
            del self._of_address[address]

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        looked = loop.time()
        while True:
            await asyncio.sleep(_LOOK_S)
            passed, looked = loop.time() - looked, loop.time()
            for connection in list(self.server_state.connections):
                if isinstance(connection, _Connection):
                    reason = connection.late(self._limits, passed)
                    if reason:
                        self._metrics.closed.labels(reason).inc()
                        connection.transport.abort()


class GatewayServer:
    """The gateway on its two ports. Use as an async context manager; the ports are known inside.

    Raises: GatewayError when a port is taken, or the certificate cannot be read.
    """

    def __init__(
        self, settings: GatewaySettings, hooks: Hooks, *, metrics: Metrics | None = None
    ) -> None:
        self._settings = settings
        self._hooks = hooks
        self._metrics = Metrics() if metrics is None else metrics
        self.port = 0
        self.status_port = 0

    async def __aenter__(self) -> GatewayServer:
        settings = self._settings
        tls = _tls(settings)
        _allow_descriptors(settings.limits.connections)
        async with contextlib.AsyncExitStack() as stack:
            upstream = Upstream(settings)
            stack.push_async_callback(upstream.close)
            public = GatewayApp(self._hooks, settings.limits, upstream, self._metrics)
            status = StatusApp(self._metrics, upstream.fault, token=settings.status_token)
            self.port = await self._listen(stack, public, settings.host, settings.port, tls)
            self.status_port = await self._listen(
                stack, status, settings.status_host, settings.status_port, None
            )
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _listen(
        self,
        stack: contextlib.AsyncExitStack,
        app: ASGIApp,
        host: str,
        port: int,
        tls: ssl.SSLContext | None,
    ) -> int:
        limits = self._settings.limits
        config = uvicorn.Config(
            app,
            loop="none",
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=math.ceil(limits.idle_s),
            timeout_graceful_shutdown=_SHUTDOWN_S,
            h11_max_incomplete_event_size=limits.head_bytes,
        )
        listening = _bound_socket(host, port)
        # Loopback's connections are not counted among the devices'.
        metrics = self._metrics if tls else Metrics()
        server = _Server(config, listening, tls, limits, metrics)
        await server.begin()
        stack.push_async_callback(server.end)
        return server.port


def run_gateway(settings: GatewaySettings, hooks: Hooks, *, metrics: Metrics | None = None) -> None:
    """Serves until SIGTERM or SIGINT. Raises: GatewayError, as GatewayServer."""

    async def serve() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        async with GatewayServer(settings, hooks, metrics=metrics) as server:
            _log.info(
                "gateway: port %d is open to devices, port %d to this machine",
                server.port,
                server.status_port,
            )
            await stop.wait()

    asyncio.run(serve())


def _tls(settings: GatewaySettings) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(settings.certificate, settings.key)
    except (OSError, ssl.SSLError) as error:
        raise GatewayError(
            f"certificate {settings.certificate}, key {settings.key}: expected a PEM pair that can "
            f"be read: {error}"
        ) from None
    return context


def _bound_socket(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setblocking(False)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except OSError as error:
        made.close()
        raise GatewayError(
            f"{host}:{port}: cannot be listened on: {error.strerror}; is another gateway running?"
        ) from None
    return made


def _allow_descriptors(connections: int) -> None:
    """A connection takes a descriptor, a request to SuperLink another, and some are for files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + 512
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        _log.warning(
            "%d connections need %d files, the system allows %d", connections, wanted, hard
        )
