# SPDX-License-Identifier: Apache-2.0
"""docs/operate.md as an operator types it: every `console` block, in order, in one deployment; and
docs/device.md, as the owner of one more device does meanwhile.

The pages' own variables are set here, to a temporary folder and to free ports. Run it with -s to
see `first_round_commands` and how long each command took.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE, DEVICE_PAGE = ROOT / "docs" / "operate.md", ROOT / "docs" / "device.md"
AFTER = "Watch"  # the section of the operator's page after which the device's is typed
MOST_COMMANDS, MOST_SECONDS = 6, 180.0
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Step:
    """A command of the page, or a script in Python, under its heading."""

    heading: str
    kind: str
    text: str


def steps(of: Path = PAGE) -> list[Step]:
    found, heading = [], ""
    page = of.read_text(encoding="utf-8")
    for part in re.split(r"^(?=## )", page, flags=re.MULTILINE):
        heading = part.splitlines()[0].lstrip("# ")
        for kind, text in _BLOCK.findall(part):
            if kind == "console":
                for line in text.splitlines():
                    assert line.startswith("$ "), f"expected a command after $, found {line}"
                    found.append(Step(heading, "console", line[2:]))
            else:
                found.append(Step(heading, kind, text))
    return found


def fedloom_commands(lines: Sequence[str]) -> set[str]:
    """The different commands in them: group and name, as `coordinator up`."""
    typed = r"\bfedloom ((?:[a-z]+ ?){1,3}?)(?= [^a-z]|$)"
    return {name for line in lines for name in re.findall(typed, line)}


class Shell:
    """One bash that all commands of the page are typed into."""

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        self._log = log.open("w")
        self._bash = subprocess.Popen(
            ["bash", "--norc", "--noprofile"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
        )
        self.type("set -o pipefail", 10)

    def type(self, command: str, seconds: float) -> str:
        """What it prints. Raises: AssertionError when it fails, or takes longer."""
        assert self._bash.stdin is not None and self._bash.stdout is not None
        mark = f"done-{time.monotonic_ns()}"
        # What goes on in the background prints later, and not into this command's answer.
        typed = f"{{ {command}\n}} 2>&1; printf '\\n{mark} %s\\n' $?\n"
        self._bash.stdin.write(typed.encode())
        self._bash.stdin.flush()
        said, last = b"", time.monotonic() + seconds
        while mark.encode() not in said or not said.endswith(b"\n"):
            left = last - time.monotonic()
            assert left > 0 and self._bash.poll() is None, f"{command}\n{said.decode()}"
            if select.select([self._bash.stdout], [], [], min(left, 1.0))[0]:
                said += os.read(self._bash.stdout.fileno(), 1 << 16)
        text, _, code = said.decode().rpartition(f"\n{mark} ")
        assert code.split()[0] == "0", f"{command}\nexit code {code.strip()}\n{text}"
        return text

    def close(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._bash.pid, number)
            time.sleep(1.0)
        self._bash.wait()
        for file in (self._bash.stdin, self._bash.stdout, self._log):
            if file is not None:
                file.close()


@pytest.fixture
def shell(tmp_path: Path, cache_of_the_session: Path) -> Iterator[Shell]:
    programs = tmp_path / "bin"
    programs.mkdir()
    command = programs / "fedloom"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m fedloom "$@"\n')
    command.chmod(0o755)
    with contextlib.ExitStack() as stack:
        names = ("--port", "--split-port", "--operator-port", "--superlink-port")
        ports = {}
        for name in names:
            one = stack.enter_context(socket.socket())
            one.bind(("127.0.0.1", 0))
            ports[name] = one.getsockname()[1]
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "FEDLOOM_CACHE": str(cache_of_the_session),
        "DIR": str(tmp_path / "ward"),
        "WORK": str(tmp_path / "beds"),
        "ADDRESS": "127.0.0.1",
        "PORTS": " ".join(f"{name} {port}" for name, port in ports.items()),
        "OPERATOR": f"http://127.0.0.1:{ports['--operator-port']}",
    }
    made = Shell(environment, tmp_path / "shell.log")
    try:
        yield made
    finally:
        made.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_command_of_the_page_runs_in_order(
    shell: Shell, tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    begun = first_round = 0.0
    typed: list[str] = []
    said: dict[str, str] = {}
    pages = [step for step in steps() if step.kind != "sh"]
    last = max(number for number, step in enumerate(pages) if step.heading == AFTER)
    for number, step in enumerate(pages):
        if number == last + 1:
            type_device_page(shell, tmp_path)
        command = step.text
        if step.kind == "python":
            command = f"{shlex.quote(sys.executable)} - <<'END'\n{step.text}END"
        elif not typed:
            begun = time.monotonic()
        started = time.monotonic()
        # A command in the background must not keep the pipe of this one.
        said[command] = shell.type(_detached(command), 400)
        print(f"{time.monotonic() - started:6.1f} s  {command.splitlines()[0]}")
        if step.kind == "console" and not first_round:
            typed.append(command)
            if "submit" in command:
                first_round = _first_round(tmp_path / "ward", said[command]) - begun
    commands = fedloom_commands(typed)
    print(f"first_round_commands: {len(commands)}, {first_round:.0f} s")
    record_property("first_round_commands", len(commands))
    record_property("first_round_seconds", round(first_round, 1))
    assert len(commands) <= MOST_COMMANDS, commands
    # Where twice as many processes wait for a core as there are cores, seconds say nothing of us.
    if os.getloadavg()[1] <= 2 * (os.cpu_count() or 1):
        assert first_round <= MOST_SECONDS

    assert (tmp_path / "ward.lost" / "jobs" / "digits-lora" / "report.html").exists()
    assert (tmp_path / "ward" / "jobs" / "second" / "summary.json").exists()
    assert "ok" in next(text for line, text in said.items() if "/healthz" in line)
    assert "fedloom_gateway_requests_total{" in next(
        text for line, text in said.items() if "/metrics" in line
    )
    assert not (tmp_path / "beds" / "bed-3").exists(), "it left"


def type_device_page(shell: Shell, tmp_path: Path) -> None:
    """Every command of docs/device.md, and its program in Python."""
    told = "fedloom coordinator token create $DIR --label kit --quota 2 --env"
    shell.type(f"export $({told}) DEVICE=$WORK/kit DATA=$WORK/bed-1.npz", 30)
    hashes = "import json, sys; print(json.load(sys.stdin)[0]['hash'])"
    job = f'fedloom coordinator status $DIR --job digits-lora --json | python3 -c "{hashes}"'
    shell.type(f"export JOB=$({job})", 30)
    for step in steps(DEVICE_PAGE):
        if step.kind == "console":
            said = shell.type(_detached(step.text), 120)
            if "predict" in step.text and "fetch" not in step.text:
                assert said.startswith("image  class  probability"), said
        elif step.kind == "python":
            # As it stands, but for what the operator tells, where the data are, and the hours: the
            # program would run until somebody ends it, as the timer here does.
            text = step.text
            for shown, real in (
                ('"https://host:8443"', 'os.environ["FEDLOOM_COORDINATOR"]'),
                ('token="..."', 'token=os.environ["FEDLOOM_TOKEN"]'),
                ('fingerprint="..."', 'fingerprint=os.environ["FEDLOOM_FINGERPRINT"]'),
                ('folder="device"', 'folder=os.environ["WORK"] + "/python"'),
                ('"~/images"', 'os.environ["DATA"]'),
            ):
                assert shown in text, f"expected {shown} in {text}"
                text = text.replace(shown, real)
            begin = "import os, threading\n"
            end = "\ndevice.leave()\n"
            text = text.replace(
                "device.run()", "threading.Timer(5, device.stop).start()\ndevice.run()"
            )
            command = f"{shlex.quote(sys.executable)} - <<'END'\n{begin}{text}{end}END"
            shell.type(command, 60)
    assert not (tmp_path / "beds" / "kit").exists(), "it left"


def _detached(command: str) -> str:
    """As it stands, but what runs on in the background prints into a file."""
    return re.sub(r"(?<!&) & ", ' >>"$WORK.log" 2>&1 & ', command)


def _first_round(folder: Path, said: str) -> float:
    """When the first round was committed, by the monotonic clock."""
    import sqlite3

    database = sqlite3.connect(folder / "jobs" / "digits-lora" / "journal.sqlite")
    (committed,) = database.execute("SELECT min(committed) FROM rounds").fetchone()
    database.close()
    assert committed, said
    return float(committed) - time.time() + time.monotonic()


def test_first_round_takes_six_commands_as_the_page_says() -> None:
    lines = [step.text for step in steps() if step.heading == "First round"]
    assert fedloom_commands(lines[1:7]) == {
        "coordinator init", "coordinator up", "coordinator token create", "device enroll",
        "device run", "coordinator submit",
    }  # fmt: skip
