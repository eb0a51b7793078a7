# SPDX-License-Identifier: Apache-2.0
"""The server of a split network in the same process: its sessions without its sockets.

Every message is packed, read and answered by the code that a stream uses, so that bytes and
rounding are those of a deployment.
"""

from __future__ import annotations

from typing import Any

from client_sdk.split_body import RemoteBody
from coordinator.onnx_body import OnnxBody
from coordinator.split_session import Engine, Session, Task, largest_message, run_tasks
from edge_runtime.bundle import Bundle
from edge_runtime.split_trainer import EVALUATION_ROWS, SplitTrainer
from protocol.split import SplitSpec
from simulations.setup import Setup


class LocalBodies:
    """Trainers whose bodies are here, on the engine of the job, and the bytes between them."""

    def __init__(self, setup: Setup) -> None:
        assert setup.split is not None, "only a split network has a body"
        simulation = setup.job.simulation
        self._most_rows = max(setup.recipe.training.batch_size, EVALUATION_ROWS)
        self._engine: Engine
        if simulation.engine == "torch":
            from tuning.split_body import TorchBody

            self._engine = TorchBody(setup.recipe.build()[1], device=simulation.device)
        else:
            self._engine = OnnxBody(setup.split.server)
        self._bodies: list[RemoteBody] = []
        self._told = (0, 0)

    def trainer(self, bundle: Bundle) -> SplitTrainer:
        """For clients; what it sends is counted."""
        body = self._body(bundle)
        self._bodies.append(body)
        return SplitTrainer(bundle, body)

    def tester(self, bundle: Bundle) -> SplitTrainer:
        """For the coordinator, which has the body beside it: nothing is counted."""
        return SplitTrainer(bundle, self._body(bundle))

    def streamed(self) -> tuple[int, int]:
        """Bytes that clients sent and received since this was last asked."""
        now = (
            sum(body.sent_bytes for body in self._bodies),
            sum(body.received_bytes for body in self._bodies),
        )
        since = (now[0] - self._told[0], now[1] - self._told[1])
        self._told = now
        return since

    def _body(self, bundle: Bundle) -> RemoteBody:
        spec = bundle.manifest.split
        assert spec is not None, "the bundle of a split job says what crosses the cut"
        return local_body(self._engine, spec, most_rows=self._most_rows)


def local_body(engine: Engine, spec: SplitSpec, *, most_rows: int) -> RemoteBody:
    """A device's body with the server's session right behind it."""
    session = Session(spec, most_rows=most_rows)

    def exchange(blob: bytes) -> bytes:
        task = session.read(blob)
        if not isinstance(task, Task):
            return task
        result: tuple[Any, Any]
        (result,) = run_tasks(engine, [task])
        return session.answer(task, *result)

    return RemoteBody(spec, exchange, max_bytes=largest_message(spec, most_rows))
