# SPDX-License-Identifier: Apache-2.0
"""Flower's SuperNode as a child of this process: it carries messages, and starts a client for each.

It is a tree of processes, SuperNode, its starter of clients and the client at work, in one process
group: all of it ends when SuperNode does. Should this process be killed, the kernel kills SuperNode
and the others notice within a second. Linux only.

*Source* Flower 1.41.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from client_sdk.errors import RunningError
from client_sdk.gateway import Address
from client_sdk.home import FOLDER_VARIABLE, PATH_VARIABLE, Home
from client_sdk.identity import Identity
from client_sdk.pinned_app import command_folder

_MODULE: Final = "client_sdk.device_app"
_PROGRAM: Final = "from flwr.supernode.cli import flower_supernode; flower_supernode()"
_LOOPBACK: Final = "127.0.0.1"
_STOP_S: Final = 10.0  # from SIGTERM to SIGKILL
_BEGIN_S: Final = 30.0  # until it has started what starts clients
_PR_SET_PDEATHSIG: Final = 1


class SuperNode:
    """One SuperNode, of the device in `home`."""

    def __init__(self, home: Home, identity: Identity, address: Address) -> None:
        self._home = home
        self._identity = identity
        self._address = address
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0

    def start(self) -> None:
        """Raises: RunningError where it cannot be started; ModuleNotFoundError without Flower."""
        if importlib.util.find_spec("flwr") is None:
            raise ModuleNotFoundError("no module named 'flwr'", name="flwr")
        try:
            self._home.flower.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, *self._arguments()],
                cwd=self._home.flower,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                process_group=0,
                preexec_fn=_DieWithParent(),
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise RunningError(f"SuperNode cannot be started: {error}") from None
        self._started = time.monotonic()

    def ended(self) -> str:
        """How it ended, in words; "" while it is at work."""
        if self._process is None:
            return "it was not started"
        code = self._process.poll()
        if code is not None:
            return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        # Without its starter it would take messages, and wait for ever for their answers.
        if time.monotonic() - self._started > _BEGIN_S and not _has_children(self._process.pid):
            return "what starts its clients is gone"
        return ""

    def stop(self) -> None:
        """Ends it and all that it started; nothing happens where it has ended."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _arguments(self) -> list[str]:
        return [
            *("--superlink", self._address.authority),
            *("--root-certificates", str(self._identity.authority_path.absolute())),
            *("--auth-supernode-private-key", str(self._identity.node_key_path.absolute())),
            # Of loopback; where another process takes the port first, the next start finds another.
            *("--host", _LOOPBACK, "--port", str(_free_port())),
        ]

    def environment(self) -> dict[str, str]:
        """Of SuperNode and of all that it starts; its PATH is a folder of two commands."""
        commands = command_folder(self._home.flower.absolute() / "commands", _MODULE)
        not_by_proxy = ",".join(filter(None, (os.environ.get("NO_PROXY", ""), _LOOPBACK)))
        return {
            **os.environ,
            "FLWR_HOME": str(self._home.flower.absolute()),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "PATH": str(commands),
            PATH_VARIABLE: os.environ.get("PATH", os.defpath),
            FOLDER_VARIABLE: str(self._home.folder.absolute()),
            # Flower's processes talk to each other over loopback.
            "NO_PROXY": not_by_proxy,
            "no_proxy": not_by_proxy,
        }


class _DieWithParent:
    """Run in the child before its program: SIGKILL for it when this process ends."""

    def __init__(self) -> None:
        self._parent = os.getpid()
        # Loaded here: between fork and exec nothing should be imported or allocated.
        self._prctl = ctypes.CDLL(None, use_errno=True).prctl

    def __call__(self) -> None:
        self._prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != self._parent:  # it died before the call
            os._exit(1)


def _free_port() -> int:
    with socket.create_server((_LOOPBACK, 0)) as found:
        return int(found.getsockname()[1])


def _has_children(parent: int) -> bool:
    """Whether a process has any that run; where /proc does not tell, it is taken to have."""
    try:
        pids = Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="ascii").split()
    except OSError:
        return True
    for pid in pids:
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
            # After the name, which may hold anything: Z is one that ended.
            if stat.rpartition(")")[2].split()[0] != "Z":
                return True
    return False
