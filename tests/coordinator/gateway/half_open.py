# SPDX-License-Identifier: Apache-2.0
"""Two sides of the test of half-sent requests, each in a process of its own: run as a script.

half_open.py attack PORT CA COUNT      opens COUNT connections that stop half way, prints how
                                       many seconds each kind lasted until it was closed
half_open.py honest PORT CA SECONDS    sends requests one after another, prints their times
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import sys
import time
from typing import Any

KINDS = ("silent", "half-hello", "tls-only", "half-line", "half-head", "half-body", "dripping")
HEAD = b"POST /v1/enroll HTTP/1.1\r\nhost: x\r\n"


async def stop_half_way(kind: str, port: int, context: ssl.SSLContext) -> float:
    """Seconds until the gateway closed it."""
    tls: dict[str, Any] = {}
    if kind not in ("silent", "half-hello"):
        tls = {"ssl": context, "server_hostname": "127.0.0.1"}
    reader, writer = await asyncio.open_connection("127.0.0.1", port, **tls)
    begun = time.monotonic()
    if kind == "half-hello":
        writer.write(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
    elif kind == "half-line":
        writer.write(b"POST /v1/fl")
    elif kind == "half-head":
        writer.write(HEAD + b"content-le")
    elif kind in ("half-body", "dripping"):
        writer.write(HEAD + b"content-length: 1000\r\n\r\nabc")
    drip = asyncio.create_task(_drip(writer)) if kind == "dripping" else None
    with contextlib.suppress(OSError, ssl.SSLError):
        while await reader.read(4096):
            pass
    if drip is not None:
        drip.cancel()
    writer.transport.abort()
    return time.monotonic() - begun


async def _drip(writer: asyncio.StreamWriter) -> None:
    """A byte now and then, so that the connection is never silent."""
    while True:
        await asyncio.sleep(0.4)
        writer.write(b"x")


async def attack(port: int, authority: str, count: int) -> dict[str, Any]:
    context = ssl.create_default_context(cafile=authority)
    kinds = [KINDS[number % len(KINDS)] for number in range(count)]
    lasted = await asyncio.gather(
        *(stop_half_way(kind, port, context) for kind in kinds), return_exceptions=True
    )
    longest: dict[str, float] = {}
    refused = 0
    for kind, seconds in zip(kinds, lasted, strict=True):
        if isinstance(seconds, BaseException):
            refused += 1
        else:
            longest[kind] = max(longest.get(kind, 0.0), seconds)
    return {"longest_s": longest, "refused": refused}


def honest(port: int, authority: str, seconds: float) -> dict[str, Any]:
    """Times of requests on a kept connection, and of those that connect first."""
    import httpx

    context = ssl.create_default_context(cafile=authority)
    kept_ms, fresh_ms = [], []
    url = f"https://127.0.0.1:{port}/v1/renew"
    end = time.monotonic() + seconds
    with httpx.Client(verify=context, trust_env=False, timeout=30) as client:
        client.post(url, content=b"x")
        while time.monotonic() < end:
            begun = time.monotonic()
            assert client.post(url, content=b"x").status_code == 200
            kept_ms.append(1e3 * (time.monotonic() - begun))
            time.sleep(0.02)
            if len(kept_ms) % 5 == 0:
                with httpx.Client(verify=context, trust_env=False, timeout=30) as other:
                    begun = time.monotonic()
                    assert other.post(url, content=b"x").status_code == 200
                    fresh_ms.append(1e3 * (time.monotonic() - begun))
    return {"kept_ms": kept_ms, "fresh_ms": fresh_ms}


if __name__ == "__main__":
    what, port, authority, number = sys.argv[1:]
    if what == "attack":
        found = asyncio.run(attack(int(port), authority, int(number)))
    else:
        found = honest(int(port), authority, float(number))
    print(json.dumps(found))
