# SPDX-License-Identifier: Apache-2.0
"""Clients of a split network in processes of their own, as devices are: real TLS, no torch."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import numpy as np

from coordinator.bundles import split_spec
from coordinator.onnx_body import OnnxBody
from edge_runtime.trainer import EVALUATION_ROWS
from simulations.backends.split import Loopback
from simulations.errors import SimulationError
from simulations.setup import Setup

_LENGTH: Final = struct.Struct("<Q")


class ClientProcesses(ExitStack):
    """A split server on loopback, and a process of `script` for every client of a job.

    A process is started as `script FOLDER CLIENT HOST:PORT`. The folder is that of the run, where
    the job's bundle is; it gets each client's data, key and certificates. Plans go to a process's
    standard input and updates come back on its output, each as its length (8 bytes, little-endian)
    and its bytes. Use as a context manager: processes end with it.
    """

    def __init__(self, setup: Setup, folder: Path, script: Path) -> None:
        super().__init__()
        assert setup.split is not None, "only a split network has a server"
        engine, spec = OnnxBody(setup.split.server), split_spec(setup.job, setup.split)
        rows = max(setup.recipe.training.batch_size, EVALUATION_ROWS)
        server = self.enter_context(Loopback(engine, spec, rows))
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        try:
            self._start(setup, folder, script, server)
        except BaseException:
            self.close()  # nobody else would, and a server that is up keeps this process alive
            raise

    def _start(self, setup: Setup, folder: Path, script: Path, server: Loopback) -> None:
        (folder / "root.pem").write_bytes(server.authority.certificate)
        for client in setup.federation.clients:
            issued = server.authority.device(client.id)
            (folder / f"{client.id}.key").write_bytes(issued.key)
            (folder / f"{client.id}.pem").write_bytes(issued.certificate)
            data = {"fit": client.fit, "held_out": client.held_out}
            arrays = {f"{part}/{name}": v for part, own in data.items() for name, v in own.items()}
            np.savez(folder / client.id, **arrays)  # type: ignore[arg-type]
            command = [sys.executable, str(script), str(folder), client.id, server.address]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self.callback(process.communicate)  # ends with its input
            self._processes[client.id] = process

    def serve(self, work: list[tuple[str, str, bytes]]) -> Iterator[tuple[str, bytes | Exception]]:
        """Every client's update, of all at once; what a client raises is its own."""
        with ThreadPoolExecutor(len(work)) as pool:
            yield from pool.map(self._ask, work)

    def _ask(self, work: tuple[str, str, bytes]) -> tuple[str, bytes | Exception]:
        client, _, plan = work
        process = self._processes[client]
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(_LENGTH.pack(len(plan)) + plan)
            process.stdin.flush()
            header = process.stdout.read(_LENGTH.size)
        except BrokenPipeError:
            header = b""
        if not header:
            return client, SimulationError(f"the process ended with {process.wait()}")
        return client, process.stdout.read(*_LENGTH.unpack(header))
