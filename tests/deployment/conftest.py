# SPDX-License-Identifier: Apache-2.0
"""A deployment on loopback, run by its own commands in processes of their own.

Devices run where torch cannot be imported: a folder that comes first on their path has a package of
that name that refuses.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FEDLOOM = [sys.executable, "-m", "fedloom"]
FORBIDDEN = ("torch", "transformers", "peft", "onnxscript")


class Ward:
    """The folders of a deployment and of its devices, and what their commands say."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.folder = base / "deployment"
        self.port, self.split, self.operator, self.superlink = free_ports(4)
        self._bare = base / "bare"
        for name in FORBIDDEN:
            (self._bare / name).mkdir(parents=True)
            text = f"raise ImportError('{name} is not on a device')\n"
            (self._bare / name / "__init__.py").write_text(text)

    def init(self) -> None:
        ports = ["--port", self.port, "--split-port", self.split]
        ports += ["--operator-port", self.operator, "--superlink-port", self.superlink]
        where = ["--name", "ward", "--address", "127.0.0.1"]
        self.said("coordinator", "init", self.folder, *where, *ports)

    @property
    def health(self) -> str:
        return f"http://127.0.0.1:{self.operator}/healthz"

    @contextlib.contextmanager
    def up(self) -> Iterator[subprocess.Popen[bytes]]:
        """`fedloom coordinator up`, from when it is healthy; a process that is gone is no fault."""
        command = [*FEDLOOM, "coordinator", "up", str(self.folder)]
        with subprocess.Popen(command, start_new_session=True, env=self.environment()) as process:
            try:
                assert eventually(lambda: answers(self.health) == 200, 90), self.logs()
                yield process
            finally:
                gone = process.poll() is not None
                process.send_signal(signal.SIGTERM)
                try:
                    assert process.wait(30) == 0 or gone, self.logs()
                finally:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)

    def token(self, quota: int = 1) -> list[str]:
        """What `device enroll` has to be told."""
        made = ["token", "create", self.folder, "--label", "bed", "--quota", quota, "--json"]
        told = json.loads(self.said("coordinator", *made))
        names = ("coordinator", "token", "fingerprint")
        return [word for name in names for word in (f"--{name}", told[name])]

    def home(self, number: int) -> Path:
        return self.base / f"device-{number}"

    def enroll(self, number: int, told: list[str]) -> str:
        """A new device; its name."""
        self.said("device", "enroll", *told, "--dir", self.home(number))
        status = self.said("device", "status", "--dir", self.home(number), "--json")
        return str(json.loads(status)["device"])

    @contextlib.contextmanager
    def running(
        self, number: int, data: Path, *options: object
    ) -> Iterator[subprocess.Popen[bytes]]:
        """`fedloom device run` without torch; its words are in `device-N.log`."""
        words = ["device", "run", "--data", data, "--threads", 1, "--dir", self.home(number)]
        with (self.base / f"device-{number}.log").open("ab") as log:
            process = subprocess.Popen(
                [*FEDLOOM, *map(str, [*words, *options])],
                start_new_session=True, stdout=log, stderr=log, env=self.environment(device=True),
            )  # fmt: skip
        with process:
            try:
                yield process
            finally:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(30)
                finally:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)

    def pids_of(self, module: str) -> list[int]:
        """Processes of a module with the deployment's folder in their environment."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):
                    if (
                        module in (entry / "cmdline").read_text()
                        and str(self.folder) in (entry / "environ").read_text()
                    ):
                        found.append(int(entry.name))
        return found

    def sum_stage(self, number: int, job: str) -> str:
        """Which state of a sum a device has on its disk; "" for none."""
        from aggregation.secure_aggregation import from_bytes
        from protocol.errors import ContainerError
        from protocol.summing import unpack_sum_request

        try:
            record = unpack_sum_request((self.home(number) / "work" / "sums" / job).read_bytes())
        except (OSError, ContainerError):
            return ""
        return type(from_bytes(record.message)).__name__

    def metrics(self) -> dict[str, float]:
        """What the gateway's `/metrics` shows its operator, by names with their labels."""
        token = (self.folder / "operator.token").read_text().strip()
        url = f"http://127.0.0.1:{self.operator}/metrics"
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=30) as response:
            lines = response.read().decode().splitlines()
        rows = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in rows}

    def submit(self, job: Any, name: str) -> None:
        """A `Job` as the operator would write it."""
        from coordinator.job import dump_job

        file = self.base / f"{name}.toml"
        file.write_text(dump_job(job))
        self.said("coordinator", "submit", self.folder, file, "--name", name)

    def job(self, name: str) -> dict[str, Any]:
        """What `status` says of a job."""
        words = ["status", self.folder, "--job", name, "--json"]
        (told,) = json.loads(self.said("coordinator", *words))
        return dict(told)

    def finish(self, name: str, *, seconds: float = 180) -> Path:
        """The folder of a job once it is finished."""
        ended = ("finished", "failed")
        assert eventually(lambda: self.job(name)["doing"] in ended, seconds, 1.0), (
            f"{self.job(name)}\n{self.logs()}"
        )
        assert self.job(name)["doing"] == "finished", self.job(name)
        return self.folder / "jobs" / name

    def said(self, *words: object, code: int = 0, device: bool = False) -> str:
        """What a command prints; where it fails, what it says of that."""
        done = subprocess.run(
            [*FEDLOOM, *map(str, words)],
            capture_output=True, text=True, timeout=180, check=False,
            env=self.environment(device=device),
        )  # fmt: skip
        assert done.returncode == code, f"{words}: {done.stdout}\n{done.stderr}\n{self.logs()}"
        return done.stdout if code == 0 else done.stderr

    def environment(self, *, device: bool = False) -> dict[str, str]:
        """Of this process, with one thread each; a device's has no torch."""
        path = [os.getcwd(), os.environ.get("PYTHONPATH", "")]
        if device:
            path.insert(0, str(self._bare))
        whole = os.pathsep.join(part for part in path if part)
        return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": whole}

    def logs(self) -> str:
        files = [*self.folder.glob("logs/*.log"), *self.folder.glob("jobs/*/job.log")]
        files += self.base.glob("device-*.log")
        return "\n".join(f"--- {path.name}\n{path.read_text()[-2500:]}" for path in files)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(count):
            one = stack.enter_context(socket.socket())
            one.bind(("127.0.0.1", 0))
            found.append(one.getsockname()[1])
        return found


def eventually(holds: Callable[[], bool], seconds: float, step: float = 0.1) -> bool:
    last = time.monotonic() + seconds
    while time.monotonic() < last:
        if holds():
            return True
        time.sleep(step)
    return False


def answers(url: str, token: str = "") -> int:
    """The status that a port of the operator's gives; 0 where nobody listens."""
    request = urllib.request.Request(url)
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return 0


@pytest.fixture
def ward(tmp_path: Path, cache_of_the_session: Path) -> Ward:
    """Folders for a deployment; nothing is made yet."""
    return Ward(tmp_path)


@pytest.fixture
def answered() -> Callable[..., int]:
    return answers


@pytest.fixture
def soon() -> Callable[..., bool]:
    return eventually


@pytest.fixture
def digits(tmp_path: Path) -> Callable[[int, int], Path]:
    """`digits(number, samples)`: a device's file of real handwritten digits, each its own."""

    def write(number: int, samples: int) -> Path:
        arrays = digit_rows(number, samples)
        path = tmp_path / f"data-{number}.npz"
        np.savez(path, **arrays)
        return path

    return write


def digit_rows(number: int, samples: int) -> Mapping[str, np.ndarray]:
    from sklearn.datasets import load_digits

    found = load_digits()
    rows = slice(number * samples, (number + 1) * samples)
    images = np.round(found.images[rows] * 255 / 16).astype(np.uint8)
    return {"images": images, "labels": found.target[rows].astype(np.int64)}


@pytest.fixture
def simulated() -> Callable[..., Mapping[str, np.ndarray]]:
    """`simulated(job, folder, devices)`: the tensors that a job of a deployment should come to."""
    return play_here


def play_here(job: Any, folder: Path, devices: Mapping[str, Path]) -> Mapping[str, np.ndarray]:
    """The tensors of the same job over the same clients, in this process, one after another."""
    from client_sdk.memory import FolderMemory
    from client_sdk.participant import prepared
    from client_sdk.settings import Settings
    from client_sdk.split import respond_split
    from client_sdk.updates import respond
    from coordinator.flower_link import FlowerLink
    from coordinator.journal import Journal
    from coordinator.onnx_body import OnnxBody
    from coordinator.rounds import run_rounds
    from edge_runtime.bundle import open_bundle
    from edge_runtime.split_trainer import SplitTrainer
    from edge_runtime.trainer import OnnxTrainer
    from simulations.backends.prepared import PreparedClient
    from simulations.backends.sequential import SequentialClients
    from simulations.backends.split import local_body
    from simulations.grid import InProcessGrid

    bundle = open_bundle(folder / "bundle", public_key=None)
    memory = folder.parent / f"memory-{folder.name}"
    clients = []
    for name, source in devices.items():
        data = prepared(Settings(data=str(source)), bundle)
        kept = FolderMemory.of(memory, name)
        clients.append(PreparedClient(id=name, fit=data.fit, held_out=data.held_out, memory=kept))
    first = bundle.initial()
    answer, trainer = respond, OnnxTrainer(bundle, threads=1)
    if bundle.manifest.split is not None:
        body = local_body(OnnxBody(folder / "body"), bundle.manifest.split, most_rows=256)
        trainer = SplitTrainer(bundle, body, threads=1)

        def answer(plan: bytes, **given: Any) -> bytes:
            return respond_split(plan, connect=lambda _: contextlib.nullcontext([body]), **given)

    serve = SequentialClients(bundle.manifest, first, trainer, clients, answer=answer).serve
    link = FlowerLink(InProcessGrid(list(devices), serve), clients=len(clients))
    spec = bundle.manifest.shared
    with Journal(folder.parent / f"{folder.name}.sqlite") as journal:
        result = run_rounds(
            job, spec, {name: first[name] for name in spec.names}, link, journal,
            lambda report: None, lambda tensors, offset: {}, pairs=bundle.manifest.pairs,
        )  # fmt: skip
    return result.tensors
