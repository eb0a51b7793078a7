# SPDX-License-Identifier: Apache-2.0
"""A deployment and its devices on loopback, for a measurement: real processes, gone afterwards."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from client_sdk.device import Device
from coordinator.deployment import Deployment, Settings
from simulations.benchmarks.command import fedloom
from simulations.errors import SimulationError

HOST: Final = "127.0.0.1"
_UP_S: Final = 120.0
_STOP_S: Final = 30.0
_WORDS: Final = 2_000  # characters of a log that an error repeats


@contextmanager
def deployed(folder: Path) -> Iterator[Deployment]:
    """`fedloom coordinator up` in `folder`/deployment, from when its port is answered.

    Raises: SimulationError where it does not come up.
    """
    settings = free_settings()
    place = folder / "deployment"
    with Deployment.create(place, settings) as deployment:
        command = [*fedloom(), "coordinator", "up", str(place)]
        with running(command, folder / "coordinator.log") as process:
            url = f"http://{HOST}:{settings.operator_port}/healthz"
            wait_until(lambda: _healthy(url), process, folder / "coordinator.log", _UP_S)
            yield deployment


def enrolled(deployment: Deployment, folder: Path) -> Device:
    """A new device of a deployment that is up."""
    return Device.enroll(
        coordinator=f"https://{HOST}:{deployment.settings.port}",
        token=deployment.enrolment.create_token("bench"),
        fingerprint=deployment.authority.fingerprint,
        folder=folder,
    )


@contextmanager
def running(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command in a process group of its own, which gets SIGTERM at the end."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    with process:
        try:
            yield process
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_S)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def wait_until(
    holds: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, seconds: float
) -> None:
    """Raises: SimulationError, with what the process said, where it ended or time is over."""
    last = time.monotonic() + seconds
    while not holds():
        if process.poll() is not None or time.monotonic() > last:
            said = log.read_text(encoding="utf-8", errors="replace")[-_WORDS:]
            how = "it ended" if process.poll() is not None else f"not within {seconds:.0f} s"
            raise SimulationError(f"{log.stem} did not come up ({how}): {said.strip()}")
        time.sleep(0.1)


def free_settings() -> Settings:
    """Of a deployment on loopback, with ports that were free just now."""
    port, split, operator, superlink = _free_ports(4)
    return Settings(
        name="bench",
        addresses=(HOST,),
        port=port,
        split_port=split,
        operator_port=operator,
        superlink_port=superlink,
    )


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(count):
            one = stack.enter_context(socket.create_server((HOST, 0)))
            found.append(int(one.getsockname()[1]))
        return found


def _healthy(url: str) -> bool:
    # Of loopback: a proxy of the environment has nothing to say there.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
