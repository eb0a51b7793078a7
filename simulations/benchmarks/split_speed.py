# SPDX-License-Identifier: Apache-2.0
"""How fast split training is: over a real stream under TLS, to a server in a process of its own."""

from __future__ import annotations

import multiprocessing
import secrets
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np

from client_sdk.split_body import RemoteBody
from client_sdk.split_stream import SplitStream
from coordinator.split_session import largest_message
from edge_runtime import preprocess
from edge_runtime.bundle import Bundle
from edge_runtime.split_trainer import SplitTrainer
from edge_runtime.trainer import initial_state
from edge_runtime.training_loop import TrainingLoop, batch_of
from protocol.split import SplitSpec
from protocol.stream import Open
from simulations.benchmarks.figure import Figure, figure
from simulations.benchmarks.runs import signed_bundle
from simulations.benchmarks.split_exact import split_job
from simulations.progress import ProgressListener, SilentProgress
from simulations.setup import Setup, set_up
from simulations.throwaway import Authority
from tuning.compiler import compile_recipe
from tuning.recipe import Recipe

THREADS: Final = 2
BATCH: Final = 32
ROWS: Final = 64  # of a message, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class _Served:
    """What a server's process needs to know."""

    recipe: Recipe
    spec: SplitSpec
    engine: str
    server: Path  # folder of the body's graphs
    authority: tuple[bytes, bytes, bytes]  # the server's key and certificate, and its root


def serve(served: _Served, pipe: Any) -> None:
    """Runs a server until the other end of the pipe says so; tells its port first."""
    import asyncio

    import torch

    from coordinator.onnx_body import OnnxBody
    from coordinator.split_server import Limits, SplitServer
    from tuning.split_body import TorchBody

    torch.set_num_threads(THREADS)
    engine: Any = (
        TorchBody(served.recipe.build()[1])
        if served.engine == "torch"
        else OnnxBody(served.server, threads=THREADS)
    )
    limits = Limits(rows=ROWS, sessions=4_000)

    async def run() -> None:
        key, certificate, root = served.authority
        import grpc

        credentials = grpc.ssl_server_credentials(
            [(key, certificate)], root_certificates=root, require_client_auth=True
        )
        server = SplitServer(
            engine, served.spec, lambda opened: "", limits, credentials=credentials
        )
        async with server:
            pipe.send(server.port)
            await asyncio.to_thread(pipe.recv)

    asyncio.run(run())


class Served:
    """A server in a process of its own, and what its clients need to reach it."""

    def __init__(self, port: int, authority: Authority) -> None:
        self.port = port
        self.authority = authority

    @contextmanager
    def body(self, spec: SplitSpec, client: str) -> Iterator[RemoteBody]:
        """A client's end of a session."""
        most = largest_message(spec, ROWS)
        opened = Open(job="0" * 64, round=1, client=client, nonce=secrets.token_hex(8))
        with SplitStream(
            f"127.0.0.1:{self.port}",
            opened,
            max_bytes=most,
            credentials=self.authority.client_credentials(client),
            server_name="server",
        ) as stream:
            yield RemoteBody(spec, stream, max_bytes=most)


@contextmanager
def serving(setup: Setup, bundle: Bundle, *, engine: str) -> Iterator[Served]:
    """A server of the job's body; torch or onnxruntime computes it."""
    assert setup.split is not None and bundle.manifest.split is not None
    authority = Authority()
    pair = authority.pair("server")
    given = _Served(
        recipe=setup.recipe,
        spec=bundle.manifest.split,
        engine=engine,
        server=setup.split.server,
        authority=(pair.key, pair.certificate, authority.certificate),
    )
    # A fresh process: gRPC does not survive a fork.
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(given, there), daemon=True)
    process.start()
    try:
        if not here.poll(120):
            raise TimeoutError("the server's process did not say its port within 120 s")
        yield Served(here.recv(), authority)
    finally:
        here.send("stop")
        process.join(10)
        if process.is_alive():
            process.kill()


@contextmanager
def made(backbone: Path | None, **options: Any) -> Iterator[tuple[Setup, Bundle]]:
    """A split job on the small ViT, compiled and signed."""
    setup = set_up(split_job(backbone, batch=BATCH, **options), SilentProgress())
    with tempfile.TemporaryDirectory() as folder:
        yield setup, signed_bundle(setup, Path(folder))


def split_rate_ratio(
    progress: ProgressListener,
    *,
    backbone: Path | None = None,
    cut: str = "faithful-minimal",
    steps: int = 10,
    repetitions: int = 7,
    engines: Sequence[str] = ("torch", "onnx"),
) -> Figure:
    """`split_rate_ratio`: steps a second through the stream, of those of the whole network's own
    graph in one process; one client, in turns, two threads each side."""
    progress.stage("split: compiling the small ViT")
    taken: dict[str, list[float]] = {}
    with made(backbone, cut=cut, samples=BATCH * steps, clients=1) as (setup, bundle):
        manifest = bundle.manifest
        spec = manifest.split
        assert spec is not None
        data = preprocess(manifest.preprocessing, setup.federation.clients[0].fit)
        whole = compile_recipe(setup.recipe)
        loop = TrainingLoop(whole.folder / "train.onnx", threads=THREADS)
        names = [name for name, _ in manifest.inputs]
        start = bundle.initial()
        steps = len(data["labels"]) // BATCH

        def unsplit() -> None:
            batches = (
                {
                    **batch_of(data, names, np.arange(BATCH * step, BATCH * (step + 1))),
                    "weight": np.ones(BATCH, np.float32),
                }
                for step in range(steps)
            )
            loop.run(start, initial_state(manifest, start), batches, 1e-3)

        with ExitStack() as stack:
            ways = {"unsplit": unsplit}
            for engine in engines:
                served = stack.enter_context(serving(setup, bundle, engine=engine))
                body = stack.enter_context(served.body(spec, f"device-{engine}"))
                trainer = SplitTrainer(bundle, body, threads=THREADS)

                def split(trainer: SplitTrainer = trainer) -> None:
                    trainer.fit(start, data, learning_rate=1e-3, epochs=1, seed=0, most_steps=steps)

                ways[engine] = split
            for number in range(repetitions + 1):
                progress.stage(f"split: rate {number}/{repetitions}")
                for way, run in ways.items():
                    began = time.perf_counter()
                    run()
                    if number:
                        taken.setdefault(way, []).append(time.perf_counter() - began)

    def ratio(engine: str) -> float:
        pairs = zip(taken["unsplit"], taken[engine], strict=True)
        return median(whole_s / split_s for whole_s, split_s in pairs)

    ratios = {engine: ratio(engine) for engine in engines}
    best = max(ratios, key=lambda engine: ratios[engine])
    rate = steps / median(taken["unsplit"])
    return figure(
        "split_rate_ratio",
        ratios[best],
        target=">= 0.85",
        note=f"small ViT, cut {cut}, batch {BATCH}, TLS on loopback: "
        + ", ".join(f"{engine} body {value:.2f}" for engine, value in ratios.items())
        + f" of {rate:.1f} steps/s unsplit",
    )


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
        made(backbone, cut="private" if backbone is None else "1+0") as (setup, bundle),
        ExitStack() as stack,
    ):
        spec = bundle.manifest.split
        assert spec is not None
        served = stack.enter_context(serving(setup, bundle, engine="torch"))
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
        made(backbone, cut="private" if backbone is None else "1+0") as (setup, bundle),
        ExitStack() as stack,
    ):
        spec = bundle.manifest.split
        assert spec is not None
        served = stack.enter_context(serving(setup, bundle, engine="torch"))
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
