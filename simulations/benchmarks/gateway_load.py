# SPDX-License-Identifier: Apache-2.0
"""What one gateway carries: requests and bytes a second of devices that ask as SuperNodes do.

The devices' signatures are made before the clock runs; TLS, HTTP and the reading of answers are on
this side, and share the machine's cores with the gateway.
"""

from __future__ import annotations

import asyncio
import datetime
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from protocol.node_headers import node_headers
from simulations.benchmarks.figure import Figure, figure
from simulations.benchmarks.gateway_serving import HOST, Served, serving
from simulations.errors import SimulationError
from simulations.progress import ProgressListener

POLL_S: Final = 3.0  # between two polls of a SuperNode of Flower 1.41
_BODY: Final = 4 << 20  # Flower's own chunks are 5 MiB
_POLL_BODY: Final = 200  # bytes, as those of Flower's requests for messages


def gateway_requests(
    progress: ProgressListener, *, devices: int = 50, requests: int = 60
) -> list[Figure]:
    """`gateway_requests_per_s`, `gateway_cpu_ms`, `gateway_p99_ms` and `gateway_devices`: small
    requests of so many devices that each ask again as soon as they are answered."""
    progress.stage(f"gateway: {devices} devices enrol")
    with serving(devices) as served:
        _asked(served, requests=3, body=_POLL_BODY)  # connections, caches, first compilations
        progress.stage(f"gateway: {devices * requests} requests")
        before = served.cpu_s()
        done = _asked(served, requests=requests, body=_POLL_BODY)
        cpu = served.cpu_s() - before
    rate = len(done.seconds) / done.wall_s
    p99 = 1000 * float(np.percentile(done.seconds, 99))
    note = f"{devices} devices at once, {len(done.seconds)} requests in {done.wall_s:.1f} s"
    return [
        figure("gateway_requests_per_s", rate, unit="1/s", note=note),
        figure(
            "gateway_cpu_ms",
            1000 * cpu / len(done.seconds),
            unit="ms",
            note="processor time of the gateway alone, a request",
        ),
        figure("gateway_p99_ms", p99, unit="ms", note=f"while {devices} devices ask all the time"),
        figure(
            "gateway_devices",
            rate * POLL_S,
            target=">= 300",
            note=f"requests a second x {POLL_S:g} s between two polls of a SuperNode",
        ),
    ]


def gateway_bytes(
    progress: ProgressListener, *, devices: int = 4, requests: int = 12, body: int = _BODY
) -> list[Figure]:
    """`gateway_up_mb_per_s` and `gateway_down_mb_per_s`: bodies as updates and models have them."""
    found = []
    for way, sent, answered in (("up", body, 64), ("down", _POLL_BODY, body)):
        progress.stage(f"gateway: bytes {way}")
        with serving(devices, answer_bytes=answered) as served:
            _asked(served, requests=1, body=sent)
            done = _asked(served, requests=requests, body=sent)
        megabytes = len(done.seconds) * body / 1e6
        note = f"{devices} devices at once, {body / 1e6:.1f} MB a request"
        found.append(
            figure(f"gateway_{way}_mb_per_s", megabytes / done.wall_s, unit="MB/s", note=note)
        )
    return found


@dataclass(frozen=True, slots=True)
class _Done:
    wall_s: float
    seconds: Sequence[float]  # of each request


def _asked(served: Served, *, requests: int, body: int) -> _Done:
    """All members ask at once, each over one connection, one request after another."""
    calls = [
        [_request(headers, body) for headers in _signed(served, number, requests)]
        for number in range(len(served.keys))
    ]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=served.authority)
    return asyncio.run(_all(served.port, context, calls))


def _signed(served: Served, number: int, requests: int) -> list[dict[str, str]]:
    """Headers that differ in their time, which the gateway takes once."""
    now = datetime.datetime.now(datetime.UTC)
    return [
        node_headers(served.keys[number], now + datetime.timedelta(microseconds=each))
        for each in range(requests)
    ]


def _request(headers: dict[str, str], body: int) -> bytes:
    lines = ["POST /v1/fleet/pull-messages HTTP/1.1", f"host: {HOST}", f"content-length: {body}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("ascii") + bytes(body)


async def _all(port: int, context: ssl.SSLContext, calls: Sequence[Sequence[bytes]]) -> _Done:
    streams = [await asyncio.open_connection(HOST, port, ssl=context) for _ in calls]
    begun = time.perf_counter()
    taken = await asyncio.gather(
        *(_one(*stream, mine) for stream, mine in zip(streams, calls, strict=True))
    )
    wall = time.perf_counter() - begun
    for _, writer in streams:
        writer.close()
    await asyncio.gather(*(w.wait_closed() for _, w in streams), return_exceptions=True)
    return _Done(wall, [seconds for one in taken for seconds in one])


async def _one(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, calls: Sequence[bytes]
) -> list[float]:
    taken = []
    for call in calls:
        begun = time.perf_counter()
        writer.write(call)
        await writer.drain()
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
        answer = await reader.readexactly(length)
        if " 200 " not in head.partition("\r\n")[0]:
            raise SimulationError(
                f"gateway: expected 200, found {head.splitlines()[0]}: {answer!r}"
            )
        taken.append(time.perf_counter() - begun)
    return taken
