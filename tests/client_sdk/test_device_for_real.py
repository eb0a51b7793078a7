# SPDX-License-Identifier: Apache-2.0
"""SuperLink, gateway, a device that runs, and a ServerApp that asks it: all started for real."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregation.codecs import codec_named
from coordinator.bundles import write_bundle
from coordinator.deployment import Deployment
from protocol.plan import Plan, pack_plan
from protocol.readiness import Survey, pack_survey, unpack_readiness
from protocol.update import unpack_update

FEDLOOM = [sys.executable, "-m", "fedloom"]

PROJECT = """
[project]
name = "driver"
version = "1.0.0"
[tool.flwr.app]
publisher = "fedloom"
fab-include = ["driver.py"]
[tool.flwr.app.components]
serverapp = "driver:app"
clientapp = "driver:client"
"""
# Asks the one node for what lies in a folder, message by message. Its ClientApp would leave a mark.
DRIVER = """
from pathlib import Path
from coordinator.server_app import FlowerLink, _wrap, make_server_app
from protocol import envelope

FOLDER = Path({folder!r})

def play(link):
    (node,) = link._nodes.values()
    for name, kind in (
        ("survey", envelope.HELLO),
        ("plan", envelope.MESSAGE_TYPES["fit"]),
    ):
        message = _wrap(node, "?", kind, (FOLDER / name).read_bytes())
        ((_, reply),) = link._converse([(name, message)], 120.0)
        (FOLDER / f"{{name}}.answer").write_bytes(envelope.read_content(reply.content)[1])

app = make_server_app(play, clients=1)

def shipped(*given):
    (FOLDER / "shipped code ran").touch()

client = shipped
"""


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(count):
            one = stack.enter_context(socket.socket())
            one.bind(("127.0.0.1", 0))
            found.append(one.getsockname()[1])
        return found


def said(*arguments: object) -> str:
    return subprocess.run(
        [*FEDLOOM, *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=True, timeout=60
    ).stdout


def eventually(check: Callable[[], Any], within_s: float = 120.0) -> Any:
    end = time.monotonic() + within_s
    while not (found := check()):
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.3)
    return found


@contextlib.contextmanager
def running(log: Path, *arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    command = [*FEDLOOM, *map(str, arguments)]
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()


def group_of(pid: int) -> list[int]:
    """Processes whose group is that of a child of `pid`."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children]


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_a_device_answers_a_survey_and_trains_and_leaves_no_process(
    tmp_path: Path, make_bundle: Any
) -> None:
    folder, home, asked = tmp_path / "deployment", tmp_path / "device", tmp_path / "asked"
    asked.mkdir()
    port, split, operator, superlink = free_ports(4)
    ports = ["--port", port, "--split-port", split, "--operator-port", operator]
    address = ["--address", "127.0.0.1", "--superlink-port", superlink]
    said("coordinator", "init", folder, "--name", "ward", *ports, *address)
    made = make_bundle("lora")
    job = made.bundle.manifest.job
    with Deployment(folder) as deployment:
        names, key = made.bundle.manifest.class_names, deployment.signing_key
        write_bundle(made.job, made.recipe, made.compiled, names, key, folder / "bundles" / job)
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "own.npz", images=images, labels=np.arange(20) % 10)

    with contextlib.ExitStack() as stack:
        stack.enter_context(running(tmp_path / "up.log", "coordinator", "up", folder))
        token = json.loads(
            said("coordinator", "token", "create", folder, "--label", "bed", "--json")
        )
        who = ["--coordinator", token["coordinator"], "--token", token["token"]]
        eventually(lambda: _listens(port))
        said("device", "enroll", *who, "--fingerprint", token["fingerprint"], "--dir", home)
        run = ["device", "run", "--data", tmp_path / "own.npz", "--dir", home]
        device = stack.enter_context(running(tmp_path / "device.log", *run))
        (group,) = eventually(lambda: group_of(device.pid))

        name = json.loads(said("device", "status", "--dir", home, "--json"))["device"]
        plan = Plan(
            job=job, round=1, nonce="cd" * 16, client=name, task="fit", downlink_codec="float32",
            uplink_codec="float32", learning_rate=0.05, local_epochs=1, seed=9,
            max_update_bytes=1_000_000,
        )  # fmt: skip
        payload = codec_named("float32").encode(made.bundle.initial())
        (asked / "plan").write_bytes(pack_plan(plan, payload))
        (asked / "survey").write_bytes(pack_survey(Survey(job=job)))
        (tmp_path / "app").mkdir()
        (tmp_path / "app" / "pyproject.toml").write_text(PROJECT)
        (tmp_path / "app" / "driver.py").write_text(DRIVER.format(folder=str(asked)))
        flwr = folder / "superlink" / "flwr"
        subprocess.run(
            [Path(sys.executable).with_name("flwr"), "run", tmp_path / "app", "fedloom"],
            env=os.environ
            | {"FLWR_HOME": str(flwr), "FLWR_TELEMETRY_ENABLED": "0"}
            | {"FLWR_DISABLE_UPDATE_CHECK": "1", "NO_PROXY": "127.0.0.1"}
            | {"FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1"},
            check=True, timeout=120, cwd=tmp_path,
        )  # fmt: skip
        eventually((asked / "plan.answer").exists)
        time.sleep(0.5)
        readiness = unpack_readiness((asked / "survey.answer").read_bytes())
        assert readiness.ready, readiness.reason
        assert (readiness.samples, readiness.held_out) == (18, 2)
        header, _ = unpack_update((asked / "plan.answer").read_bytes(), max_bytes=1_000_000)
        assert (header.client, header.samples) == (name, 18)

        status = json.loads(said("device", "status", "--dir", home, "--json"))
        assert status["running"] == device.pid
        assert (status["last_work"]["round"], status["last_work"]["refused"]) == (1, "")
        assert not list(asked.glob("shipped*")), "no code that came may run"
        device.send_signal(signal.SIGTERM)
        assert device.wait(30) == 0
        eventually(lambda: not alive(group), 10)
    said("device", "leave", "--dir", home)
    assert not home.exists()


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True
