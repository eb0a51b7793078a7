# SPDX-License-Identifier: Apache-2.0
"""What the gateway counts, for Prometheus, and the loopback app that shows it."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """Counters of one gateway, in a registry of its own or in the caller's."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = registry = CollectorRegistry() if registry is None else registry
        self.requests = Counter(
            "fedloom_gateway_requests",
            "Requests answered, by route and HTTP status",
            ("route", "status"),
            registry=registry,
        )
        self.seconds = Histogram(
            "fedloom_gateway_request_seconds",
            "From a request's headers to the end of its answer",
            ("route",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.received = Counter(
            "fedloom_gateway_received_bytes", "Bodies received", ("route",), registry=registry
        )
        self.sent = Counter(
            "fedloom_gateway_sent_bytes", "Bodies sent", ("route",), registry=registry
        )
        self.at_work = Gauge(
            "fedloom_gateway_requests_at_work", "Requests being answered", registry=registry
        )
        self.connections = Gauge(
            "fedloom_gateway_connections",
            "Open connections, those in the TLS handshake included",
            registry=registry,
        )
        self.closed = Counter(
            "fedloom_gateway_connections_closed",
            "Connections that the gateway closed, by the reason",
            ("reason",),
            registry=registry,
        )


class StatusApp:
    """`/healthz` for anybody, and `/metrics` for whoever shows the token, where there is one.

    `healthy` says what is wrong, "" where nothing is.
    """

    def __init__(
        self, metrics: Metrics, healthy: Callable[[], Awaitable[str]], *, token: str = ""
    ) -> None:
        self._metrics = metrics
        self._healthy = healthy
        self._expected = f"Bearer {token}".encode() if token else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, as ASGI has it."""
        shown = dict(scope["headers"]).get(b"authorization", b"")
        await (await self._answer(scope["path"], shown))(scope, receive, send)

    async def _answer(self, path: str, shown: bytes) -> Response:
        if path == "/healthz":
            wrong = await self._healthy()
            return PlainTextResponse(wrong or "ok", status_code=503 if wrong else 200)
        if path == "/metrics" and not hmac.compare_digest(shown, self._expected or shown):
            words = "expected the operator's token: Authorization: Bearer TOKEN"
            return PlainTextResponse(words, status_code=401, headers={"www-authenticate": "Bearer"})
        if path == "/metrics":
            from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

            text = generate_latest(self._metrics.registry)
            return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})
        return PlainTextResponse("expected /healthz or /metrics", status_code=404)
