# SPDX-License-Identifier: Apache-2.0
"""Flower's SuperLink on loopback: how it is started, how its nodes are registered, and how a run
of a job is asked for.

Whoever reaches SuperLink's port can submit code and register nodes, so it listens on loopback, and
the gateway stands before it. Flower is asked through its own commands, `flwr supernode ...`: they
are its documented interface, and need a connection named in FLWR_HOME/config.toml. Each takes one
to three seconds, of which nearly all is Python loading Flower.

*Source* Flower 1.41.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from coordinator.errors import SuperLinkError
from coordinator.supervisor import Command

CONNECTION: Final = "fedloom"
"""The name of the connection in FLWR_HOME, for `flwr run APP fedloom` and the like."""
HOST: Final = "127.0.0.1"

JOB_KEY: Final = "job"
"""What a run's configuration says: the name of a job."""

_COMMAND_S: Final = 60.0
_APP: Final = "app"
_APP_MODULE: Final = "fedloom_app"
# Flower wants an app for every run, and names in it that are there. Ours is loaded by nobody:
# coordinator and devices run what is installed.
_APP_TEXT: Final = f"""\
[project]
name = "fedloom"
version = "1.0.0"
description = "Names a job; holds no code."
license = "Apache-2.0"
dependencies = ["flwr>=1.41,<1.43"]

[tool.flwr.app]
publisher = "fedloom"

[tool.flwr.app.components]
serverapp = "{_APP_MODULE}:nothing"
clientapp = "{_APP_MODULE}:nothing"

[tool.flwr.app.config]
{JOB_KEY} = ""
"""
_STOP_S: Final = 15.0  # SuperLink gives its own children a second, and closes its database


@dataclass(frozen=True, slots=True, kw_only=True)
class SuperLink:
    """One SuperLink. `certificate` has to name 127.0.0.1, and `authority` to have signed it."""

    folder: Path  # its database, and FLWR_HOME; absolute
    port: int
    certificate: Path
    key: Path
    authority: Path
    programs: Path | None = None
    """A folder that comes first where it looks for its other programs."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Environment of its own processes, beside what Flower needs."""

    def __post_init__(self) -> None:
        if not self.folder.is_absolute() or not self.authority.is_absolute():
            # Flower refuses a relative path to the certificate, and its children run elsewhere.
            raise SuperLinkError(f"expected absolute paths, found {self.folder}, {self.authority}")

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"{HOST}:{self.port}"

    def environment(self) -> dict[str, str]:
        """What every process of Flower's has to be started with, on top of its surroundings."""
        programs = str(Path(sys.executable).parent)
        return {
            "FLWR_HOME": str(self.folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            # Flower finds its other programs by name.
            "PATH": os.pathsep.join([programs, os.environ.get("PATH", os.defpath)]),
            # Its clients would ask a proxy of the environment for loopback, too.
            "NO_PROXY": HOST,
            "no_proxy": HOST,
        }

    def command(self) -> Command:
        """How it is started."""
        environment = {**self.environment(), **self.variables}
        if self.programs is not None:
            environment["PATH"] = f"{self.programs}{os.pathsep}{environment['PATH']}"
        return Command(
            name="superlink",
            argv=[
                _program("flower-superlink"),
                *("--host", HOST, "--port", str(self.port)),
                *("--ssl-certfile", str(self.certificate)),
                *("--ssl-keyfile", str(self.key)),
                *("--ssl-ca-certfile", str(self.authority)),
                "--enable-supernode-auth",
                "--disable-runtime-dependency-installation",
                *("--database", str(self.folder / "superlink.sqlite")),
            ],
            environment=environment,
            folder=self.folder,
            stop_s=_STOP_S,
        )

    def prepare(self) -> None:
        """Makes its folders, the connection that Flower's commands use, and the app that names a
        job; may be done again."""
        home = self.folder / "flwr"
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        text = (
            f"[superlink]\ndefault = {json.dumps(CONNECTION)}\n\n[superlink.{CONNECTION}]\n"
            f"address = {json.dumps(self.address)}\n"
            f"root-certificates = {json.dumps(str(self.authority))}\n"
        )
        new = home / "config.toml.new"
        new.write_text(text, encoding="utf-8")
        new.replace(home / "config.toml")
        app = self.folder / _APP
        app.mkdir(mode=0o700, exist_ok=True)
        (app / "pyproject.toml").write_text(_APP_TEXT, encoding="utf-8")
        (app / f"{_APP_MODULE}.py").write_text("nothing = None\n", encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Node:
    """A node as SuperLink knows it."""

    node_id: int
    status: str  # "registered" (never seen), "online", "offline" or "unregistered"


class Nodes:
    """The nodes of a SuperLink that is running. One command at a time; may be used by threads."""

    def __init__(self, superlink: SuperLink) -> None:
        self._superlink = superlink
        self._lock = threading.Lock()

    def register(self, public_key: bytes, *, name: str = "") -> int:
        """SuperLink's number for the node with this key (PEM, of P-256, P-384 or P-521).

        Raises: SuperLinkError, also for a key that is registered already.
        """
        with tempfile.TemporaryDirectory(prefix="fedloom-") as folder:
            path = Path(folder) / "node.pub"
            path.write_bytes(_ssh_spelling(public_key))
            named = ["--name", name] if name else []
            return int(self._flwr("register", str(path), *named)["node-id"])

    def unregister(self, node_id: int) -> None:
        """SuperLink refuses this node from its next request on. Raises: SuperLinkError."""
        self._flwr("unregister", str(node_id))

    def all(self) -> list[Node]:
        """Every node that is not unregistered. Raises: SuperLinkError."""
        rows = self._flwr("list")["nodes"]
        return [Node(int(row["node-id"]), str(row["status"])) for row in rows]

    def _flwr(self, what: str, *arguments: str) -> Mapping[str, Any]:
        with self._lock:
            return _asked(self._superlink, "supernode", what, *arguments, CONNECTION)


class Runs:
    """The runs of a SuperLink that is up."""

    def __init__(self, superlink: SuperLink) -> None:
        self._superlink = superlink

    def start(self, job: str) -> int:
        """Have the program for runs started, for this job; SuperLink's number for the run.

        Raises: SuperLinkError.
        """
        named = ["--run-config", f"{JOB_KEY}={json.dumps(job)}"]
        answer = _asked(
            self._superlink, "run", str(self._superlink.folder / _APP), CONNECTION, *named
        )
        return int(answer["run-id"])


def _asked(superlink: SuperLink, *words: str) -> Mapping[str, Any]:
    """What a command of Flower's answers. Raises: SuperLinkError."""
    said_as = " ".join(["flwr", *words[:2]])
    try:
        done = subprocess.run(
            [_program("flwr"), *words, "--format", "json"],
            env={**os.environ, **superlink.environment()},
            capture_output=True,
            text=True,
            timeout=_COMMAND_S,
            # Outside any project: Flower looks for one in the folder where it runs.
            cwd=superlink.folder,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SuperLinkError(
            f"{said_as}: no answer in {_COMMAND_S:g} s from SuperLink at {superlink.address}; is "
            "it running?"
        ) from None
    answer = _last_object(done.stdout)
    if done.returncode or not answer.get("success", False):
        said = str(answer.get("error-message") or done.stderr or done.stdout).strip()
        raise SuperLinkError(f"{said_as}: {' '.join(said.split())[-500:] or 'no word why'}")
    return answer


def _program(name: str) -> str:
    """A program of this Python environment. Raises: SuperLinkError."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise SuperLinkError(f"expected {path}, found none; install fedloom[coordinator]")
    return str(path)


def _ssh_spelling(public_key: bytes) -> bytes:
    """The key as `flwr supernode register` reads it, in the format of OpenSSH."""
    from cryptography.hazmat.primitives import serialization

    try:
        key = serialization.load_pem_public_key(public_key)
        return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    except ValueError as error:
        raise SuperLinkError(f"expected a node's public key in PEM: {error}") from None


def _last_object(text: str) -> Mapping[str, Any]:
    """The JSON object that a command printed last; before it may stand words for people."""
    decoder = json.JSONDecoder()
    for start in [place for place, letter in enumerate(text) if letter == "{"]:
        try:
            found, end = decoder.raw_decode(text, start)
        except json.JSONDecodeError:
            continue
        if isinstance(found, dict) and not text[end:].strip():
            return found
    return {}
