# SPDX-License-Identifier: Apache-2.0
"""The real thing on loopback, started by its own commands: from `init` to a revoked device."""

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
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

FEDLOOM = [sys.executable, "-m", "fedloom"]
pytestmark = pytest.mark.slow


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(count):
            one = stack.enter_context(socket.socket())
            one.bind(("127.0.0.1", 0))
            found.append(one.getsockname()[1])
        return found


def said(*arguments: object, code: int = 0) -> str:
    done = subprocess.run(
        [*FEDLOOM, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def eventually(holds: Callable[[], bool], seconds: float) -> bool:
    last = time.monotonic() + seconds
    while time.monotonic() < last:
        if holds():
            return True
        time.sleep(0.1)
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


@contextlib.contextmanager
def up(folder: Path, health: str) -> Iterator[subprocess.Popen[bytes]]:
    """`fedloom coordinator up`, from when it is healthy."""
    command = [*FEDLOOM, "coordinator", "up", str(folder)]
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            assert eventually(lambda: answers(health) == 200, 90), logs(folder)
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                assert process.wait(30) == 0
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def logs(folder: Path) -> str:
    return "\n".join(path.read_text()[-3000:] for path in (folder / "logs").glob("*.log"))


def test_from_init_to_a_revoked_device(tmp_path: Path) -> None:
    folder, home = tmp_path / "deployment", tmp_path / "device"
    port, split, operator, superlink = free_ports(4)
    ports = ["--port", port, "--split-port", split, "--operator-port", operator]
    address = ["--address", "127.0.0.1", "--superlink-port", superlink]
    said("coordinator", "init", folder, "--name", "ward", *ports, *address)
    health = f"http://127.0.0.1:{operator}/healthz"
    with up(folder, health):
        told = json.loads(
            said("coordinator", "token", "create", folder, "--label", "bed", "--json")
        )
        who = ["--coordinator", told["coordinator"], "--token", told["token"], "--dir", home]
        wrong = ["--fingerprint", "0" * 64]
        assert "somebody may stand in between" in said("device", "enroll", *who, *wrong, code=2)
        assert not home.exists(), "nothing was accepted"

        said("device", "enroll", *who, "--fingerprint", told["fingerprint"])
        mine = json.loads(said("device", "status", "--dir", home, "--json"))
        assert mine["certificate_valid"] and mine["coordinator"] == "ward"
        (listed,) = json.loads(said("coordinator", "devices", folder, "--json"))
        assert listed["name"] == mine["device"] and listed["versions"]["fedloom"] != "none"
        other = [*who[:4], "--dir", tmp_path / "second", "--fingerprint", told["fingerprint"]]
        assert "ask the operator for a new one" in said("device", "enroll", *other, code=2)

        # Metrics are the operator's alone.
        metrics = f"http://127.0.0.1:{operator}/metrics"
        assert answers(metrics) == 401
        assert answers(metrics, (folder / "operator.token").read_text()) == 200

        said("coordinator", "revoke", folder, mine["device"])
        said("device", "leave", "--dir", home)
        assert not home.exists()
    events = json.loads(said("coordinator", "audit", folder, "--json"))
    assert [entry["event"] for entry in events["entries"]] == [
        "token", "enrolled", "refused", "revoked",
    ]  # fmt: skip
    assert events["broken"] is None
