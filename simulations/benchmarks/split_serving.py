# SPDX-License-Identifier: Apache-2.0
"""A split server in a process of its own, under TLS, with a throw-away authority."""

from __future__ import annotations

import multiprocessing
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from client_sdk.split_body import RemoteBody
from client_sdk.split_stream import SplitStream
from coordinator.bundles import recipe_of, split_spec, write_bundle
from coordinator.job import Job
from edge_runtime import open_bundle
from edge_runtime.bundle import Bundle
from protocol.signing import new_key
from protocol.split import SplitSpec, largest_message
from protocol.stream import Open
from simulations.setup import load_job_data
from simulations.throwaway import ThrowAway
from tuning.recipe import Recipe
from tuning.split_compiler import SplitCompiled, compile_split

THREADS: Final = 2
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

    def __init__(self, port: int, authority: ThrowAway) -> None:
        self.port = port
        self.authority = authority

    @contextmanager
    def body(self, spec: SplitSpec, client: str, lane: int = 0) -> Iterator[RemoteBody]:
        """A client's end of a session."""
        most = largest_message(spec, ROWS)
        opened = Open(job="0" * 64, round=1, client=client, nonce=secrets.token_hex(8), lane=lane)
        with SplitStream(
            f"127.0.0.1:{self.port}",
            opened,
            max_bytes=most,
            credentials=self.authority.client_credentials(client),
            server_name="server",
        ) as stream:
            yield RemoteBody(spec, stream, max_bytes=most)


@contextmanager
def serving(made: Made, *, engine: str) -> Iterator[Served]:
    """A server of the job's body; torch or onnxruntime computes it."""
    authority = ThrowAway()
    pair = authority.server()
    given = _Served(
        recipe=made.recipe,
        spec=made.spec,
        engine=engine,
        server=made.compiled.server,
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A split job, compiled and signed."""

    job: Job
    recipe: Recipe
    compiled: SplitCompiled
    bundle: Bundle
    spec: SplitSpec


@contextmanager
def made(job: Job, cache: Path | None = None) -> Iterator[Made]:
    """The job, compiled into `cache`, while its bundle is needed."""
    names = load_job_data(job).class_names
    recipe = recipe_of(job, len(names))
    compiled = compile_split(recipe, cache, lanes=job.split.lanes)
    spec = split_spec(job, compiled)
    with tempfile.TemporaryDirectory() as folder:
        path = write_bundle(
            job, recipe, compiled.device, names, new_key(), Path(folder) / "bundle", split=spec
        )
        bundle = open_bundle(path, public_key=None)
        yield Made(job=job, recipe=recipe, compiled=compiled, bundle=bundle, spec=spec)
