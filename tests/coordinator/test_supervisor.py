# SPDX-License-Identifier: Apache-2.0
"""Real processes: a supervisor in one of its own, watching small scripts."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from coordinator.errors import SupervisorError
from coordinator.supervisor import Command, Restarts, Supervisor

ROOT = Path(__file__).resolve().parents[2]
SLEEP = "import time; time.sleep(300)"
DEAF = (
    "import signal, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "print('deaf')\n"
    "time.sleep(300)"
)
DETACHED = (
    "import subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'], "
    "start_new_session=True)\n"
    "print('detached', child.pid, flush=True)\n"
    "time.sleep(300)"
)


def script(**commands: str) -> str:
    """A program that supervises these Python scripts."""
    return f"""
import sys
from pathlib import Path
from coordinator.errors import SupervisorError
from coordinator.supervisor import *
commands = [
    Command(name=name, argv=[sys.executable, "-u", "-c", code], stop_s=1.0,
            environment={{"GREETING": "hello"}})
    for name, code in {commands!r}.items()
]
restarts = Restarts(first_pause_s=0.05, longest_pause_s=0.1, most=4, within_s=60.0)
logs = LogFiles(max_bytes=4000, kept=2)
try:
    Supervisor(commands, Path(sys.argv[1]), restarts=restarts, logs=logs).run()
except SupervisorError as error:
    sys.exit(f"gave up: {{error}}")
"""


@contextmanager
def supervised(folder: Path, **commands: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", script(**commands), str(folder)],
        cwd=ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def eventually(check: Callable[[], Any], within_s: float = 20.0) -> Any:
    end = time.monotonic() + within_s
    while not (found := check()):
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.05)
    return found


def pid_of(folder: Path, name: str) -> int | None:
    try:
        state = json.loads((folder / "processes.json").read_text())
    except OSError:
        return None
    found = state["processes"][name]["pid"]
    return None if found is None else int(found)


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def log(folder: Path, name: str) -> str:
    path = folder / f"{name}.log"
    return path.read_text() if path.exists() else ""


def test_process_that_was_killed_is_started_again(tmp_path: Path) -> None:
    with supervised(tmp_path, one=SLEEP, two=SLEEP) as supervisor:
        first = eventually(lambda: pid_of(tmp_path, "one"))
        other = eventually(lambda: pid_of(tmp_path, "two"))
        os.kill(first, signal.SIGKILL)
        second = eventually(
            lambda: pid_of(tmp_path, "one") not in (None, first) and pid_of(tmp_path, "one")
        )
        assert pid_of(tmp_path, "two") == other
        supervisor.terminate()
        assert supervisor.wait(15) == 0
        assert not alive(second) and not alive(other)
    assert "ended: signal SIGKILL" in log(tmp_path, "one")
    assert json.loads((tmp_path / "processes.json").read_text())["processes"] == {
        "one": {"pid": None, "restarts": 1}, "two": {"pid": None, "restarts": 0},
    }  # fmt: skip


def test_process_that_keeps_dying_is_given_up_with_its_last_words(tmp_path: Path) -> None:
    broken = (
        "import os; print('the disk of', os.environ['GREETING'], 'is full'); raise SystemExit(3)"
    )
    with supervised(tmp_path, good=SLEEP, broken=broken) as supervisor:
        good = eventually(lambda: pid_of(tmp_path, "good"))
        said = supervisor.communicate(timeout=30)[1]
        assert supervisor.returncode == 1
    assert "broken: given up: it ended 5 times in" in said
    assert "exit code 3" in said and "the disk of hello is full" in said
    assert not alive(good)


def test_command_that_does_not_exist_is_said(tmp_path: Path) -> None:
    program = (
        "from pathlib import Path; from coordinator.supervisor import *\n"
        f"Supervisor([Command(name='x', argv=['/does/not/exist'])], Path({str(tmp_path)!r})).run()"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert "SupervisorError: x: cannot be started" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_process_that_will_not_stop_is_killed(tmp_path: Path, number: int) -> None:
    with supervised(tmp_path, deaf=DEAF) as supervisor:
        eventually(lambda: "deaf" in log(tmp_path, "deaf"))
        deaf = pid_of(tmp_path, "deaf")
        supervisor.send_signal(number)
        assert supervisor.wait(20) == 0
    assert deaf is not None and not alive(deaf)
    assert "did not stop in 1 s, and is killed" in log(tmp_path, "deaf")


def detached_pid(folder: Path) -> int:
    line = eventually(
        lambda: [x for x in log(folder, "one").splitlines() if x.startswith("detached")]
    )
    return int(line[0].split()[1])


def test_what_a_child_detached_is_ended_with_it(tmp_path: Path) -> None:
    with supervised(tmp_path, one=DETACHED) as supervisor:
        detached = detached_pid(tmp_path)
        assert alive(detached)
        supervisor.terminate()
        assert supervisor.wait(20) == 0
    assert not alive(detached)


def test_children_die_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    with supervised(tmp_path, one=SLEEP, two=DEAF) as supervisor:
        pids = [eventually(lambda name=name: pid_of(tmp_path, name)) for name in ("one", "two")]
        eventually(lambda: "deaf" in log(tmp_path, "two"))
        supervisor.kill()
        supervisor.wait(10)
    eventually(lambda: not any(map(alive, pids)))


def test_logs_are_turned_over(tmp_path: Path) -> None:
    talks = (
        "import time\n"
        "for n in range(400): print('line', n, 'x' * 40)\n"
        "print('end')\n"
        "time.sleep(300)"
    )
    with supervised(tmp_path, one=talks) as supervisor:
        eventually(lambda: "end" in log(tmp_path, "one"))
        supervisor.terminate()
        assert supervisor.wait(20) == 0
    files = sorted(path.name for path in tmp_path.glob("one.log*"))
    assert files == ["one.log", "one.log.1", "one.log.2"]
    # A read of the pipe is written whole, so that a file may be longer by one.
    assert all((tmp_path / name).stat().st_size <= 4000 + (64 << 10) for name in files)


def test_pauses_grow_to_a_longest_and_differ() -> None:
    restarts, rng = Restarts(first_pause_s=1, longest_pause_s=10, jitter=0.5), random.Random(1)
    pauses = [[restarts.pause_s(number, rng) for _ in range(50)] for number in range(8)]
    for number, found in enumerate(pauses):
        longest = min(10, 2**number)
        assert longest / 2 <= min(found) < max(found) <= longest


def test_names_and_commands_are_checked(tmp_path: Path) -> None:
    for name in ("", "../x", "a b", "ä"):
        with pytest.raises(SupervisorError, match="expected a name of letters"):
            Command(name=name, argv=["x"])
    with pytest.raises(SupervisorError, match="expected a command, found none"):
        Command(name="x", argv=[])
    with pytest.raises(SupervisorError, match="found x twice"):
        Supervisor([Command(name="x", argv=["x"])] * 2, tmp_path)
