# SPDX-License-Identifier: Apache-2.0
"""To SuperLink and back, piece by piece: no body is held whole, none is longer than the limit."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Final

import httpx
from starlette.types import Receive, Send

from coordinator.errors import RefusedError
from coordinator.gateway.settings import GatewaySettings

# Named, not filtered: what is not known to be needed does not reach SuperLink. Neither list has a
# hop-by-hop header, nor one by which a caller could say where it comes from.
_TO_SUPERLINK: Final = (b"content-type", b"content-length", b"accept")
_TO_DEVICE: Final = (b"content-type", b"content-length")
_FLOWER: Final = b"flwr-"

Headers = Iterable[tuple[bytes, bytes]]


class GoneError(Exception):
    """The device broke off in the middle of its request; there is nobody to answer."""


class Upstream:
    """SuperLink's port on loopback, over TLS. Close it with `close`."""

    def __init__(self, settings: GatewaySettings) -> None:
        import ssl

        context = ssl.create_default_context(cafile=str(settings.upstream_authority))
        limits = settings.limits
        host = settings.upstream_host
        self._base = f"https://{f'[{host}]' if ':' in host else host}:{settings.upstream_port}"
        self._most = limits.fleet_bytes
        self._client = httpx.AsyncClient(
            verify=context,
            # A proxy of the environment has no business between two processes of one machine.
            trust_env=False,
            timeout=httpx.Timeout(limits.upstream_s, connect=5.0),
            limits=httpx.Limits(
                max_connections=limits.requests,
                max_keepalive_connections=limits.requests,
                # SuperLink closes after 5 s: reusing a connection just then would fail.
                keepalive_expiry=2.0,
            ),
        )

    async def close(self) -> None:
        """Closes all connections."""
        await self._client.aclose()

    async def forward(self, path: str, headers: Headers, receive: Receive, send: Send) -> None:
        """Sends one request on, and its answer back.

        Raises: RefusedError before the answer began; GoneError when the device broke off.
        """
        passed = _passed(headers, _TO_SUPERLINK)
        request = self._client.build_request(
            "POST",
            self._base + path,
            headers={**passed, "accept-encoding": "identity"},
            content=limited_body(receive, self._most),
        )
        try:
            response = await self._client.send(request, stream=True)
        except httpx.LocalProtocolError as error:
            raise RefusedError(f"the body is not as its headers say: {error}", status=400) from None
        except httpx.TimeoutException:
            raise RefusedError("SuperLink does not answer in time; try again", status=504) from None
        except httpx.TransportError:
            raise RefusedError("SuperLink cannot be reached; try again", status=503) from None
        try:
            await send(
                {
                    "type": "http.response.start",
                    "status": response.status_code,
                    "headers": [
                        (name.encode("latin-1"), value.encode("latin-1"))
                        for name, value in _passed(response.headers.raw, _TO_DEVICE).items()
                    ],
                }
            )
            async for chunk in response.aiter_raw():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await response.aclose()

    async def fault(self) -> str:
        """Why SuperLink does not answer; "" where it does."""
        try:
            response = await self._client.get(self._base + "/health", timeout=2.0)
        except httpx.TransportError as error:
            return f"superlink: {type(error).__name__}"
        return "" if response.status_code < 500 else f"superlink: HTTP {response.status_code}"


async def limited_body(receive: Receive, most: int) -> AsyncIterator[bytes]:
    """A request's body, at most `most` bytes of it.

    Raises: RefusedError 413 for more; GoneError when the device breaks off.
    """
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise GoneError
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > most:
            raise RefusedError(f"expected a body of at most {most} bytes", status=413)
        if chunk:
            yield chunk
        if not message.get("more_body", False):
            return


def _passed(headers: Headers, names: Iterable[bytes]) -> Mapping[str, str]:
    return {
        name.lower().decode("latin-1"): value.decode("latin-1")
        for name, value in headers
        if name.lower() in names or name.lower().startswith(_FLOWER)
    }
