# SPDX-License-Identifier: Apache-2.0
"""The public paths, and nothing beside them.

    POST /v1/fleet/NAME              to SuperLink, for devices that are known
    GET  /v1/bundles/HASH/FILE       a file of a bundle, for devices that are known
    GET  /v1/authority               the authority's certificate, for anybody, rarely
    POST /v1/enroll, /v1/renew       to the authority, for anybody, rarely

Whatever a caller does wrong is answered by one line of text and the end of the connection. A
SuperNode ends at 401, tries again at 503 and 504, and takes 403 for "the run is over", which is why
nothing here answers 403.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Final

import anyio
import anyio.to_thread
from starlette.responses import PlainTextResponse, Response
from starlette.types import Message, Receive, Scope, Send

from coordinator.errors import RefusedError
from coordinator.gateway.bundles import BundleFiles
from coordinator.gateway.forward import GoneError, Upstream, limited_body
from coordinator.gateway.identity import Doorkeeper
from coordinator.gateway.metrics import Metrics
from coordinator.gateway.rate import RateLimit
from coordinator.gateway.settings import Exchange, GatewayLimits, Hooks

# On the path as it was sent: what would have to be decoded or resolved first is no path of ours.
_FLEET: Final = re.compile(r"/v1/fleet/[a-z][a-z0-9-]{0,63}")
_BUNDLE: Final = re.compile(r"/v1/bundles/([0-9a-f]{64})/([A-Za-z0-9_][A-Za-z0-9._/-]{0,254})")
_THREADS: Final = 4  # of enrolments at work

_log = logging.getLogger(__name__)


class GatewayApp:
    """The ASGI app of the public port."""

    def __init__(
        self, hooks: Hooks, limits: GatewayLimits, upstream: Upstream, metrics: Metrics
    ) -> None:
        self._hooks = hooks
        self._limits = limits
        self._upstream = upstream
        self._metrics = metrics
        self._doorkeeper = Doorkeeper(hooks.refuse)
        self._bundles = BundleFiles(hooks.find_bundle)
        self._rate = RateLimit(limits.enrolments_burst, limits.enrolments_per_s)
        self._at_work: Counter[bytes] = Counter()
        self._enrolments = 0
        self._threads: anyio.CapacityLimiter | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, as ASGI has it."""
        begun = time.monotonic()
        call = _Call(scope, receive, send)
        self._metrics.at_work.inc()
        try:
            await self._serve(call)
        except RefusedError as refused:
            await call.refuse(refused)
        except GoneError:
            pass
        except Exception:
            # What went wrong here is for the operator's log, not for whoever asked.
            _log.exception("%s: cannot be answered", call.route)
            await call.refuse(RefusedError("the gateway failed; see its log", status=500))
        finally:
            self._metrics.at_work.dec()
            self._metrics.requests.labels(call.route, str(call.status)).inc()
            self._metrics.seconds.labels(call.route).observe(time.monotonic() - begun)
            self._metrics.received.labels(call.route).inc(call.received)
            self._metrics.sent.labels(call.route).inc(call.sent)

    async def _serve(self, call: _Call) -> None:
        method, path = call.scope["method"], call.scope["raw_path"].decode("latin-1")
        if method == "POST" and _FLEET.fullmatch(path):
            call.route = "fleet"
            with self._device(call):
                call.bound(self._limits.fleet_bytes)
                await self._upstream.forward(
                    path, call.scope["headers"], call.receive_counted, call.send_counted
                )
        elif method == "GET" and (match := _BUNDLE.fullmatch(path)):
            call.route = "bundles"
            with self._device(call):
                call.bound(0)
                response = await self._bundles.answer(match[1], match[2], call.headers)
                await response(call.scope, call.receive_counted, call.send_counted)
        elif method == "GET" and path == "/v1/authority":
            call.route = "authority"
            self._require_rare(call)
            call.bound(0)
            response = Response(self._hooks.authority, media_type="application/x-pem-file")
            await response(call.scope, call.receive_counted, call.send_counted)
        elif method == "POST" and path == "/v1/enroll":
            call.route = "enroll"
            await self._enrolment(call, self._hooks.enroll)
        elif method == "POST" and path == "/v1/renew":
            call.route = "renew"
            await self._enrolment(call, self._hooks.renew)
        else:
            raise RefusedError("nothing is here", status=404)

    @contextlib.contextmanager
    def _device(self, call: _Call) -> Iterator[None]:
        """A place for a request of a device that is known, while it is answered."""
        device = self._doorkeeper.admit(call.scope["headers"])
        together, of_device = self._limits.requests, self._limits.requests_of_device
        if self._at_work.total() >= together or self._at_work[device] >= of_device:
            raise RefusedError("too many requests at once; try again", status=503, again_s=1.0)
        self._at_work[device] += 1
        try:
            yield
        finally:
            self._at_work[device] -= 1
            if not self._at_work[device]:
                del self._at_work[device]
            self._hooks.seen(device, call.received, call.sent)

    def _require_rare(self, call: _Call) -> None:
        if wait := self._rate.wait_s(call.address):
            raise RefusedError("too many enrolments from here", status=429, again_s=wait)

    async def _enrolment(self, call: _Call, exchange: Exchange) -> None:
        self._require_rare(call)
        if self._enrolments >= self._limits.enrolments:
            raise RefusedError("too many enrolments at once", status=503, again_s=1.0)
        self._enrolments += 1
        try:
            call.bound(self._limits.enrolment_bytes)
            body = b"".join(
                [
                    piece
                    async for piece in limited_body(
                        call.receive_counted, self._limits.enrolment_bytes
                    )
                ]
            )
            if self._threads is None:
                self._threads = anyio.CapacityLimiter(_THREADS)
            answer = await anyio.to_thread.run_sync(exchange, body, limiter=self._threads)
        finally:
            self._enrolments -= 1
        response = Response(answer, media_type="application/octet-stream")
        await response(call.scope, call.receive_counted, call.send_counted)


class _Call:
    """One request: what was asked, and what has been answered so far."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.route = "none"
        self.status = 0  # none was sent
        self.received = 0
        self.sent = 0
        self._receive = receive
        self._send = send

    @property
    def address(self) -> str:
        """Whoever is at the other end of the connection; headers could say anything."""
        client = self.scope.get("client")
        return client[0] if client else ""

    @property
    def headers(self) -> Mapping[str, str]:
        """In lower case; of a name that is there twice, the last."""
        return {
            name.decode("latin-1"): value.decode("latin-1") for name, value in self.scope["headers"]
        }

    def bound(self, most: int) -> None:
        """Raises: RefusedError 413 when the headers say more. A body may still say less."""
        length = self.headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 18 or int(length) > most:
            raise RefusedError(f"expected a body of at most {most} bytes", status=413)

    async def receive_counted(self) -> Message:
        """As `receive` of ASGI."""
        message = await self._receive()
        self.received += len(message.get("body", b""))
        return message

    async def send_counted(self, message: Message) -> None:
        """As `send` of ASGI."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if self.status >= 400:
                # The rest of the request may still be on its way, and nobody will read it.
                message["headers"] = [*message["headers"], (b"connection", b"close")]
        self.sent += len(message.get("body", b""))
        await self._send(message)

    async def refuse(self, refused: RefusedError) -> None:
        """Says why, if nothing was said yet; else the connection breaks off, as it must."""
        if self.status:
            raise refused
        headers = {}
        if refused.again_s:
            headers["retry-after"] = str(math.ceil(refused.again_s))
        response = PlainTextResponse(str(refused), status_code=refused.status, headers=headers)
        await response(self.scope, self._receive, self.send_counted)
