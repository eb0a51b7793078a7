# SPDX-License-Identifier: Apache-2.0
"""A child that stands for SuperNode: what it is given, and how all of it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from client_sdk import supernode
from client_sdk.gateway import Address
from client_sdk.home import Home
from client_sdk.identity import Identity
from client_sdk.supernode import SuperNode

# Tells what it was given, starts a child that does not want to stop, and stays.
STAYS = """
import json, os, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", '''
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(100)
'''])
told = {"argv": sys.argv[1:], "env": dict(os.environ), "child": child.pid, "cwd": os.getcwd()}
open("told.new", "w").write(json.dumps(told))
os.rename("told.new", "told.json")
time.sleep(100)
"""


def eventually(check: Callable[[], Any], within_s: float = 20.0) -> Any:
    end = time.monotonic() + within_s
    while not (found := check()):
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.02)
    return found


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.fixture
def made(tmp_path: Path) -> Iterator[SuperNode]:
    Identity(tmp_path / "device").key()
    node = SuperNode(Home(tmp_path / "device"), Identity(tmp_path / "device"), Address("::1", 8443))
    yield node
    node.stop()


def told(folder: Path) -> Any:
    path = folder / "device" / "work" / "flower" / "told.json"
    eventually(path.exists)
    return json.loads(path.read_text())


def test_it_is_told_who_it_is_and_finds_nothing_but_our_client(
    made: SuperNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supernode, "_PROGRAM", STAYS)
    monkeypatch.setenv("NO_PROXY", "inside.example")
    made.start()
    found = told(tmp_path)
    device = tmp_path / "device"
    given = dict(zip(found["argv"][::2], found["argv"][1::2], strict=True))
    assert given.pop("--port").isdecimal()
    assert given == {
        "--superlink": "[::1]:8443",
        "--root-certificates": str(device / "authority.pem"),
        "--auth-supernode-private-key": str(device / "node_key"),
        "--host": "127.0.0.1",
    }
    environment = found["env"]
    assert sorted(os.listdir(environment["PATH"])) == ["flower-superexec", "flwr-clientapp"]
    assert environment["FEDLOOM_DEVICE"] == str(device)
    assert environment["FEDLOOM_DEVICE_PATH"] == os.environ["PATH"]
    assert environment["NO_PROXY"] == "inside.example,127.0.0.1"
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert environment["FLWR_HOME"] == found["cwd"] == str(device / "work" / "flower")


def test_stopping_ends_what_it_started(
    made: SuperNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supernode, "_PROGRAM", STAYS)
    made.start()
    child = told(tmp_path)["child"]
    assert made.ended() == ""
    made.stop()
    eventually(lambda: gone(child))
    assert made.ended() == "it was not started"


def test_it_says_how_it_ended(made: SuperNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supernode, "_PROGRAM", "raise SystemExit(7)")
    made.start()
    assert eventually(made.ended) == "exit code 7"
    monkeypatch.setattr(supernode, "_PROGRAM", "import os; os.kill(os.getpid(), 9)")
    made.start()
    assert eventually(made.ended) == "signal SIGKILL"


def test_without_its_starter_of_clients_it_is_of_no_use(
    made: SuperNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supernode, "_PROGRAM", STAYS)
    monkeypatch.setattr(supernode, "_BEGIN_S", 0.0)
    made.start()
    child = told(tmp_path)["child"]
    assert made.ended() == ""
    os.kill(child, 9)
    assert eventually(made.ended) == "what starts its clients is gone"


def test_it_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    code = f"""
import os, sys, time
from pathlib import Path
from client_sdk import supernode
from client_sdk.gateway import Address
from client_sdk.home import Home
from client_sdk.identity import Identity
supernode._PROGRAM = {STAYS!r}
folder = Path(sys.argv[1])
Identity(folder).key()
supernode.SuperNode(Home(folder), Identity(folder), Address("::1", 1)).start()
while not (folder / "work/flower/told.json").exists():
    time.sleep(0.02)
children = Path(f"/proc/{{os.getpid()}}/task/{{os.getpid()}}/children").read_text()
(folder / "children").write_text(children)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "device"], timeout=60, check=False
    )
    assert done.returncode == -9
    (pid,) = (tmp_path / "device" / "children").read_text().split()
    eventually(lambda: gone(int(pid)))
    os.kill(told(tmp_path)["child"], 9)  # Flower's own would have noticed by itself
