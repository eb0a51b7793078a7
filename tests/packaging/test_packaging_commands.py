# SPDX-License-Identifier: Apache-2.0
"""What the units, compose files and images start, really started: in a folder of the test's own."""

from __future__ import annotations

import contextlib
import json
import os
import re
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

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable


@contextlib.contextmanager
def started(words: list[str], environment: dict[str, str], stop_s: float) -> Iterator[Any]:
    """Runs a command, and ends it as systemd would: SIGTERM, and so many seconds."""
    with subprocess.Popen(words, env=environment, start_new_session=True) as process:
        try:
            yield process
            process.send_signal(signal.SIGTERM)
            assert process.wait(stop_s) == 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_commands_start_a_deployment_and_stop_at_sigterm(
    commands: dict[str, list[str]],
    read_compose: Callable[[str], dict[str, Any]],
    read_unit: Callable[[str], dict[str, dict[str, str]]],
    tmp_path: Path,
) -> None:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(4)]
        port, split, operator, superlink = (one.getsockname()[1] for one in sockets)
    images, labels = np.zeros((9, 8, 8), np.uint8), np.arange(9) % 3
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def here(words: list[str], *, device: str = "unit") -> list[str]:
        """The command in this prefix, by this Python."""
        places = {
            "/var/lib/fedloom/deployment": tmp_path / "deployment",
            "/var/lib/fedloom/devices/%i/home": tmp_path / device,
            "/var/lib/fedloom/device": tmp_path / device,
            "/data/data.npz": tmp_path / "data.npz",
            "${FEDLOOM_DATA}": tmp_path / "data.npz",
            ":9443": f":{operator}",
        }
        made = []
        for word in words:
            for old, new in places.items():
                word = word.replace(old, str(new))
            made.append(word)
        assert "/var/lib" not in " ".join(made), made
        named = re.fullmatch(r"(.*/)?(fedloom|python)", made[0])
        assert named, made
        return [PYTHON, *(["-m", "fedloom"] if named[2] == "fedloom" else []), *made[1:]]

    def run(words: list[str], code: int | None = 0) -> str:
        done = subprocess.run(
            words, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert code is None or done.returncode == code, done.stderr
        return done.stdout if code is not None else str(done.returncode)

    def eventually(words: list[str], seconds: float) -> bool:
        last = time.monotonic() + seconds
        while time.monotonic() < last:
            if run(words, None) == "0":
                return True
            time.sleep(0.5)
        return False

    def healthy(file: str, service: str) -> list[str]:
        return here(read_compose(file)["services"][service]["healthcheck"]["test"][1:])

    ports = ["--port", port, "--split-port", split, "--operator-port", operator]
    init = ["init", tmp_path / "deployment", "--name", "ward", "--address", "127.0.0.1"]
    group = [PYTHON, "-m", "fedloom", "coordinator"]
    run([*group, *map(str, [*init, *ports, "--superlink-port", superlink])])
    start = commands["fedloom-coordinator.service ExecStart"]
    # The other two start the coordinator by the very same command.
    for other in ("coordinator.compose.yaml coordinator", "Dockerfile.coordinator CMD"):
        assert here(commands[other]) == here(start)

    unit = "fedloom-coordinator.service"
    stop_s = float(read_unit(unit)["Service"]["TimeoutStopSec"])
    with started(here(start), environment, stop_s):
        assert eventually(healthy("coordinator.compose.yaml", "coordinator"), 120)
        token = [*group, "token", "create", str(tmp_path / "deployment"), "--label", "bed"]
        told = run([*token, "--quota", "2", "--env"])
        environment |= dict(line.split("=", 1) for line in told.splitlines())
        enroll = commands["fedloom-device@.service ExecStartPre"]
        first = run(here(enroll))
        assert run(here(enroll)) == first, "a second start enrols nobody"
        run(here(commands["device.compose.yaml enroll"], device="compose"))
        listed = json.loads(run([*group, "devices", str(tmp_path / "deployment"), "--json"]))
        assert len(listed) == 2

        check = [
            word.replace("/compose", "/unit") for word in healthy("device.compose.yaml", "device")
        ]
        assert run(check, None) != "0", "nothing runs the device yet"
        unit = "fedloom-device@.service"
        stop_s = float(read_unit(unit)["Service"]["TimeoutStopSec"])
        with started(here(commands[f"{unit} ExecStart"]), environment, stop_s):
            assert eventually(check, 60)
        # Its data are remembered, so that the image's own command is enough now.
        with started(here(commands["Dockerfile.device CMD"]), environment, stop_s):
            assert eventually(check, 60)
        compose = here(commands["device.compose.yaml device"], device="compose")
        with started(compose, environment, stop_s):
            assert eventually([word.replace("/unit", "/compose") for word in check], 60)
    state = json.loads((tmp_path / "deployment" / "logs" / "processes.json").read_bytes())
    assert all(part["pid"] is None for part in state["processes"].values())
