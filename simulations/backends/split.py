# SPDX-License-Identifier: Apache-2.0
"""The server of a split network beside its clients: in the same memory, or on loopback under TLS.

In memory every message is packed, read and answered by the code that a stream uses, so that bytes
and rounding are those of a deployment.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from client_sdk.split import SplitAddress, connect
from client_sdk.split_body import Exchange, RemoteBody
from coordinator.onnx_body import OnnxBody
from coordinator.split_session import Engine, Session, Task, run_tasks
from edge_runtime.bundle import Bundle
from edge_runtime.split_trainer import EVALUATION_ROWS, SplitTrainer
from protocol.plan import Plan
from protocol.split import SplitSpec, largest_message
from simulations.setup import Setup


class LocalBodies:
    """The body of a job, for its clients and for the coordinator, and the bytes between them.

    Use as a context manager: a server on loopback is up inside.
    """

    def __init__(self, setup: Setup, bundle: Bundle) -> None:
        assert setup.split is not None, "only a split network has a body"
        assert bundle.manifest.split is not None, "the bundle of a split job says what is cut"
        simulation = setup.job.simulation
        self._spec: SplitSpec = bundle.manifest.split
        self._rows = max(setup.recipe.training.batch_size, EVALUATION_ROWS)
        self._engine: Engine
        if simulation.engine == "torch":
            from tuning.split_body import TorchBody

            self._engine = TorchBody(setup.recipe.build()[1], device=simulation.device)
        else:
            self._engine = OnnxBody(setup.split.server)
        self._bundle = bundle
        self._loopback = Loopback(self._engine, self._spec, self._rows)
        self._at_work = threading.Lock()
        self._on_loopback = simulation.stream == "loopback"
        self._streamed = (0, 0)

    def __enter__(self) -> LocalBodies:
        if self._on_loopback:
            self._loopback.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self._on_loopback:
            self._loopback.__exit__()

    def trainer(self) -> SplitTrainer:
        """For clients, who find the body through `connect`."""
        return SplitTrainer(self._bundle)

    def tester(self) -> SplitTrainer:
        """For the coordinator, which has the body beside it: nothing is counted."""
        return SplitTrainer(self._bundle, self._beside())

    @contextmanager
    def connect(self, plan: Plan) -> Iterator[list[RemoteBody]]:
        """A plan's sessions, one a lane."""
        with ExitStack() as stack:
            if self._on_loopback:
                where = self._loopback.where(plan.client)
                lanes = stack.enter_context(connect(plan, where, self._spec, most_rows=self._rows))
            else:
                lanes = [self._beside() for _ in range(self._spec.lanes)]
            try:
                yield lanes
            finally:
                # What a client sent before it failed was sent all the same.
                up, down = self._streamed
                self._streamed = (
                    up + sum(lane.sent_bytes for lane in lanes),
                    down + sum(lane.received_bytes for lane in lanes),
                )

    def streamed(self) -> tuple[int, int]:
        """Bytes that clients sent and received since this was last asked."""
        since, self._streamed = self._streamed, (0, 0)
        return since

    def _beside(self) -> RemoteBody:
        return local_body(self._engine, self._spec, most_rows=self._rows, at_work=self._at_work)


class Loopback:
    """A split server on a thread of this process, under a throw-away authority.

    Use as a context manager.
    """

    def __init__(self, engine: Engine, spec: SplitSpec, most_rows: int) -> None:
        self._engine = engine
        self._spec = spec
        self._most_rows = most_rows
        self._up, self._down = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._port = 0

    def __enter__(self) -> Loopback:
        from simulations.throwaway import ThrowAway

        self.authority = ThrowAway()
        self._thread.start()
        if not self._up.wait(30):
            raise TimeoutError("the split server on loopback did not come up within 30 s")
        return self

    def __exit__(self, *_: object) -> None:
        self._down.set()
        self._thread.join(10)

    @property
    def address(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self._port}"

    def where(self, client: str) -> SplitAddress:
        """What a client called so needs to connect."""
        credentials = self.authority.client_credentials(client)
        return SplitAddress(address=self.address, credentials=credentials, server_name="server")

    async def _serve(self) -> None:
        from coordinator.split_server import Limits, SplitServer

        # Plans come from this process: every session that a client opens is expected.
        server = SplitServer(
            self._engine,
            self._spec,
            lambda opened: "",
            Limits(rows=self._most_rows),
            credentials=self.authority.server_credentials(),
        )
        async with server:
            self._port = server.port
            self._up.set()
            await asyncio.to_thread(self._down.wait)


def local_body(
    engine: Engine, spec: SplitSpec, *, most_rows: int, at_work: threading.Lock | None = None
) -> RemoteBody:
    """A device's body with the server's session right behind it; sessions that share an engine
    share a lock, as a server does one pass at a time."""
    exchange = local_exchange(engine, spec, most_rows, at_work or threading.Lock())
    return RemoteBody(spec, exchange, max_bytes=largest_message(spec, most_rows))


def local_exchange(
    engine: Engine, spec: SplitSpec, most_rows: int, at_work: threading.Lock
) -> Exchange:
    """What a stream does, without one: a session answers each message at once."""
    session = Session(spec, most_rows=most_rows)

    def exchange(blob: bytes) -> bytes:
        task = session.read(blob)
        if not isinstance(task, Task):
            return task
        result: tuple[Any, Any]
        with at_work:
            (result,) = run_tasks(engine, [task])
        return session.answer(task, *result)

    return exchange
