# SPDX-License-Identifier: Apache-2.0
"""A split server under load: many devices at once, and uploads that never end."""

from __future__ import annotations

import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

import numpy as np

from client_sdk.split_body import RemoteBody
from simulations.benchmarks.figure import Figure, figure
from simulations.benchmarks.split_exact import split_job
from simulations.benchmarks.split_serving import THREADS, Served, made, serving
from simulations.progress import ProgressListener


def split_batching_ratio(
    progress: ProgressListener,
    *,
    backbone: Path | None = None,
    clients: int = 16,
    rounds: int = 6,
    rows: int = 4,
    repetitions: int = 5,
) -> Figure:
    """`split_batching_ratio`: messages a second of many clients at once, of one after another."""
    taken: dict[str, list[float]] = {"together": [], "in turns": []}
    with (
        made(split_job(backbone, cut="private" if backbone is None else "1+0")) as job,
        ExitStack() as stack,
    ):
        spec = job.spec
        served = stack.enter_context(serving(job, engine="torch"))
        bodies = [stack.enter_context(served.body(spec, f"c{i}")) for i in range(clients)]
        rng = np.random.default_rng(0)
        hidden = rng.standard_normal((rows, *spec.entering.shape), dtype=np.float32)
        gradient = rng.standard_normal((rows, *spec.leaving.shape), dtype=np.float32)

        def steps(body: RemoteBody) -> None:
            for _ in range(rounds):
                body.forward(hidden, None, keep=True)
                body.backward(gradient)

        def together() -> None:
            with ThreadPoolExecutor(clients) as pool:
                list(pool.map(steps, bodies))

        def in_turns() -> None:
            for body in bodies:
                steps(body)

        for number in range(repetitions + 1):
            progress.stage(f"split: batching {number}/{repetitions}")
            for way, run in (("together", together), ("in turns", in_turns)):
                began = time.perf_counter()
                run()
                if number:
                    taken[way].append(time.perf_counter() - began)
    ratio = median(
        turns / at_once for turns, at_once in zip(taken["in turns"], taken["together"], strict=True)
    )
    rate = clients * rounds / median(taken["together"])
    return figure(
        "split_batching_ratio",
        ratio,
        target=">= 2",
        note=f"{clients} clients, {rows} samples a message, torch body, {THREADS} threads: "
        f"{rate:.0f} steps/s at once",
    )


def slow_loris_p99_ms(
    progress: ProgressListener,
    *,
    backbone: Path | None = None,
    uploads: int = 1_000,
    steps: int = 200,
) -> Figure:
    """`slow_loris_p99_ms`: how much longer the 99th percentile of an honest client's steps takes
    while uploads hang that were begun and never ended."""
    with (
        made(split_job(backbone, cut="private" if backbone is None else "1+0")) as job,
        ExitStack() as stack,
    ):
        spec = job.spec
        served = stack.enter_context(serving(job, engine="torch"))
        body = stack.enter_context(served.body(spec, "honest"))
        rng = np.random.default_rng(0)
        hidden = rng.standard_normal((4, *spec.entering.shape), dtype=np.float32)

        def percentile() -> float:
            seconds = []
            for _ in range(steps):
                began = time.perf_counter()
                left = body.forward(hidden, None, keep=True)
                body.backward(left)
                seconds.append(time.perf_counter() - began)
            return 1000 * float(np.percentile(seconds, 99))

        progress.stage("split: an honest client alone")
        percentile()
        idle = percentile()
        progress.stage(f"split: {uploads} half-open uploads")
        hanging = stack.enter_context(half_open(served, uploads))
        beside = percentile()
    return figure(
        "slow_loris_p99_ms",
        beside - idle,
        unit="ms",
        target="<= 50",
        note=f"{idle:.1f} ms alone, {beside:.1f} ms beside {hanging} half-open uploads under TLS",
    )


@contextmanager
def half_open(served: Served, count: int) -> Iterator[int]:
    """Connections with a client's certificate that begin a message and never end it; how many."""
    pair = served.authority.pair("mallory")
    context = ssl.create_default_context(cadata=served.authority.certificate.decode())
    context.check_hostname = False
    context.set_alpn_protocols(["h2"])
    with tempfile.TemporaryDirectory() as folder:
        for name, text in (("key", pair.key), ("certificate", pair.certificate)):
            (Path(folder) / name).write_bytes(text)
        context.load_cert_chain(Path(folder) / "certificate", Path(folder) / "key")
    open_sockets: list[socket.socket] = []
    lock = threading.Lock()

    def hang(_: int) -> None:
        try:
            plain = socket.create_connection(("127.0.0.1", served.port), timeout=30)
            secure = context.wrap_socket(plain, server_hostname="server")
            # HTTP/2's preface, its settings, and the first bytes of a frame that stays unfinished.
            secure.sendall(
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
                + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
                + b"\x00\x40\x00\x00\x00\x00\x00\x00\x01"
                + b"\x00" * 16
            )
        except OSError:
            return
        with lock:
            open_sockets.append(secure)

    try:
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(hang, range(count)))
        yield len(open_sockets)
    finally:
        for each in open_sockets:
            each.close()
