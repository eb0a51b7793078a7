# SPDX-License-Identifier: Apache-2.0
"""What the gateway counts, for Prometheus, and the loopback app that shows it."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Metric

_JOB_GAUGES = {
    "epsilon": "Privacy that a job's committed rounds have spent, epsilon at its delta",
    "delta": "The delta of a job's epsilon",
    "budget": "Most epsilon that a job may spend",
    "left": "Budget less epsilon",
    "noise_multiplier": "Noise on a round's sum, in clipping norms",
    "clip": "Clipping norm of the last committed round",
    "unclipped": "Noised share of updates that were not clipped, in the last committed round",
}
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


class JobGauges:
    """What private jobs have spent, asked for whenever somebody looks.

    `spent` gives for each job its privacy as `RoundReport.privacy` has it, {} for one without.
    """

    def __init__(self, spent: Callable[[], Mapping[str, Mapping[str, Any]]]) -> None:
        self._spent = spent

    def collect(self) -> Iterator[Metric]:
        """As prometheus_client asks for it."""
        from prometheus_client.core import GaugeMetricFamily

        found = {job: told for job, told in self._spent().items() if told}
        for key, help_text in _JOB_GAUGES.items():
            family = GaugeMetricFamily(f"fedloom_job_{key}", help_text, labels=("job",))
            for job, told in sorted(found.items()):
                if told.get(key) is not None:
                    family.add_metric((job,), float(told[key]))
            yield family


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
