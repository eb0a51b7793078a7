# SPDX-License-Identifier: Apache-2.0
"""packaging/ without a container engine: structure, names and values of each file."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coordinator.deployment import Settings

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "packaging"
DOCKERFILES = sorted(path.name for path in FOLDER.glob("Dockerfile.*"))
COMPOSE = sorted(path.name for path in FOLDER.glob("*.compose.yaml"))
UNITS = sorted(path.name for path in FOLDER.glob("*.service"))
DEFAULTS = Settings(name="x", addresses=("localhost",))
# Who reads a variable that these files set.
READERS = {
    "PATH": "the system",
    "PYTHONUNBUFFERED": "Python",
    "FEDLOOM_CACHE": "tuning/cache.py",
    "FEDLOOM_COORDINATOR": "fedloom/cli/variables.py",
    "FEDLOOM_TOKEN": "fedloom/cli/variables.py",
    "FEDLOOM_FINGERPRINT": "fedloom/cli/variables.py",
    "FEDLOOM_DATA": "packaging/fedloom-device@.service",
}
_TIME = re.compile(r"\d+s")
_SIZE = re.compile(r"\d+[mg]")
# Of the compose specification: the keys of a service that we use, and what each holds.
SERVICE: dict[str, Callable[[Any], bool]] = {
    "image": lambda v: isinstance(v, str),
    "build": lambda v: set(v) == {"context", "dockerfile"},
    "command": lambda v: isinstance(v, list) and all(isinstance(word, str) for word in v),
    "env_file": lambda v: isinstance(v, list),
    "ports": lambda v: all(re.fullmatch(r"\d+:\d+", port) for port in v),
    "volumes": lambda v: all(re.fullmatch(r"[\w./]+:/[\w/]+(:ro)?", one) for one in v),
    "healthcheck": lambda v: set(v) == {"test", "interval", "timeout", "retries", "start_period"},
    "restart": lambda v: v in ("no", "always", "on-failure", "unless-stopped"),
    "depends_on": lambda v: all(
        one == {"condition": "service_completed_successfully"} for one in v.values()
    ),
    "stop_grace_period": lambda v: bool(_TIME.fullmatch(v)),
    "mem_limit": lambda v: bool(_SIZE.fullmatch(v)),
    "pids_limit": lambda v: isinstance(v, int) and v > 0,
    "read_only": lambda v: v is True,
    "init": lambda v: v is True,
    "tmpfs": lambda v: all(re.fullmatch(r"/tmp:size=\d+m,mode=1777", one) for one in v),
    "cap_drop": lambda v: v == ["ALL"],
    "security_opt": lambda v: v == ["no-new-privileges:true"],
}
HARDENED = {"read_only", "tmpfs", "cap_drop", "security_opt"}


def test_the_folder_holds_what_its_page_lists() -> None:
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    there = {path.name for path in FOLDER.iterdir()} - {"README.md", "device.env", "data"}
    table = "".join(line for line in page.splitlines() if line.startswith("| `"))
    assert (
        set(re.findall(r"`((?:Dockerfile|[\w@.-]+\.(?:yaml|service|example))[\w.]*)`", table))
        == there
    )


def test_every_command_is_one_that_fedloom_takes(
    commands: dict[str, list[str]], require_command: Callable[[list[str]], None]
) -> None:
    assert len(commands) == 8
    for words in commands.values():
        require_command(words)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_image_is_built_from_what_is_shipped_and_runs_as_nobody_else(
    name: str, read_dockerfile: Callable[[str], Any]
) -> None:
    build, final = read_dockerfile(name)
    told = {word: [i.rest for i in final if i.word == word] for word in ("USER", "COPY", "CMD")}
    assert told["USER"] == ["fedloom"] and len(told["CMD"]) == 1
    order = [instruction.word for instruction in final]
    assert "RUN" not in order[order.index("USER") :], "nothing is installed as the user"
    sources = [
        source
        for instruction in (*build, *final)
        if instruction.word == "COPY" and not instruction.rest.startswith("--from")
        for source in instruction.rest.split()[:-1]
    ]
    assert all((ROOT / source).exists() for source in sources)
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = {each.partition(".")[0] for each in project["tool"]["setuptools"]["packages"]}
    assert packages <= set(sources), "a package that is shipped is not copied"
    (install,) = [i.rest for i in build if "pip install" in i.rest]
    extra = "device" if name.endswith("device") else "simulation"
    assert "-c constraints.txt" in install and f"'.[{extra}]'" in install
    assert extra in project["project"]["optional-dependencies"]
    python = {i.rest.split()[0] for i in (*build, *final) if i.word == "FROM"}
    assert python == {"python:3.11-slim"}, "the version that the suite is run with, in both stages"
    for instruction in final:
        if instruction.word == "ENV":
            assert all(pair.split("=")[0] in READERS for pair in instruction.rest.split())
        if instruction.word == "EXPOSE":
            assert instruction.rest == f"{DEFAULTS.port} {DEFAULTS.split_port}"


@pytest.mark.parametrize("name", COMPOSE)
def test_compose_file_is_as_the_specification_has_it(
    name: str, read_compose: Callable[[str], dict[str, Any]]
) -> None:
    found = read_compose(name)
    assert {key for key in found if not key.startswith("x-")} == {"name", "services", "volumes"}
    for service in found["services"].values():
        assert set(service) <= set(SERVICE), sorted(set(service) - set(SERVICE))
        wrong = [key for key, value in service.items() if not SERVICE[key](value)]
        assert not wrong
        assert set(service) >= HARDENED and "restart" in service
        assert (FOLDER / service["build"]["context"]).resolve() == ROOT
        assert (ROOT / service["build"]["dockerfile"]).exists()
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            # ./data is the device owner's, and the only one that is not a volume of compose's.
            assert source in found["volumes"] or source == "./data"
        for file in service.get("env_file", []):
            assert (FOLDER / f"{file}.example").exists()
        assert set(service.get("depends_on", ())) <= set(found["services"])
        if check := service.get("healthcheck"):
            assert check["test"][:3] == ["CMD", "python", "-c"]
            compile(check["test"][3], name, "exec")
            assert all(_TIME.fullmatch(check[key]) for key in ("interval", "timeout"))


def test_compose_publishes_the_ports_of_a_deployment_and_asks_its_health(
    read_compose: Callable[[str], dict[str, Any]],
) -> None:
    service = read_compose("coordinator.compose.yaml")["services"]["coordinator"]
    assert service["ports"] == [f"{port}:{port}" for port in (DEFAULTS.port, DEFAULTS.split_port)]
    assert f"127.0.0.1:{DEFAULTS.operator_port}/healthz" in service["healthcheck"]["test"][3]


def test_variables_of_the_example_are_those_that_are_read(example: dict[str, str]) -> None:
    for name in example:
        assert name in (ROOT / READERS[name]).read_text(encoding="utf-8")
    assert set(example) == {name for name in READERS if name.startswith("FEDLOOM_")} - {
        "FEDLOOM_CACHE"
    }


@pytest.mark.parametrize("name", UNITS)
def test_unit_is_hardened_and_stops_in_time(
    name: str, read_unit: Callable[[str], dict[str, dict[str, str]]]
) -> None:
    service = read_unit(name)["Service"]
    for key, value in {
        "NoNewPrivileges": "yes", "ProtectSystem": "strict", "PrivateTmp": "yes",
        "CapabilityBoundingSet": "", "Restart": "on-failure", "KillMode": "mixed",
    }.items():  # fmt: skip
        assert service[key] == value
    state = f"/var/lib/{service['StateDirectory']}"
    written = [service["WorkingDirectory"], *re.findall(r"/var/lib\S*", service["ExecStart"])]
    assert all(path.startswith(state) for path in written), "nothing else can be written"
    if name == "fedloom-device@.service":
        assert "MemoryMax" in service
        assert service["EnvironmentFile"] == "/etc/fedloom/%i.env"
    # SuperLink has 15 s, the other two parts 10 s each; a device's SuperNode 10 s.
    assert int(service["TimeoutStopSec"]) >= (35 if "coordinator" in name else 15)
    if "Environment" in service:
        assert service["Environment"].partition("=")[0] in READERS


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("name", UNITS)
def test_systemd_finds_nothing_wrong_with_a_unit(name: str, tmp_path: Path) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    # It looks whether the program is there; another one is, on every machine.
    (tmp_path / name).write_text(text.replace("/opt/fedloom/bin/fedloom", sys.executable))
    command = ["systemd-analyze", "verify", str(tmp_path / name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    about = [line for line in done.stderr.splitlines() if name.partition("@")[0] in line]
    assert not about, about


def test_pages_type_commands_that_fedloom_takes(
    require_command: Callable[[list[str]], None],
) -> None:
    """The `sh` blocks of pages, which nobody runs: each fedloom command, each file of ours."""
    typed = []
    for page in (ROOT / "docs" / "operate.md", FOLDER / "README.md"):
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"^```sh\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
            for path in re.findall(r"packaging/[\w.@-]+", block):
                assert (ROOT / path).exists(), path
            for line in block.splitlines():
                words = shlex.split(line, comments=True)
                assert not words or words[0] in {
                    "export", "pip", "docker", "install", "systemd-run", "systemctl", "useradd",
                    "python3", "/opt/fedloom/bin/pip",
                }, line  # fmt: skip
                names = [Path(word).name for word in words]
                if "fedloom" in names and words[0] in ("docker", "systemd-run"):
                    typed.append(words[names.index("fedloom") :])
    assert len(typed) == 3
    for words in typed:
        require_command(words)


def test_device_needs_none_of_what_only_a_coordinator_has() -> None:
    """Everything that `device run` loads, with the rest out of reach."""
    blocked = (
        "torch", "transformers", "peft", "sklearn", "onnx", "onnxscript", "matplotlib", "PIL",
        "tokenizers", "prometheus_client", "ray", "coordinator", "tuning", "simulations",
        "reports",
    )  # fmt: skip
    code = f"""
import importlib, pkgutil, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} was asked for")

sys.meta_path.insert(0, Blocked())
import client_sdk, edge_runtime
for package in (client_sdk, edge_runtime):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(found.name)
import fedloom.cli
import grpc, onnxruntime
import flwr.clientapp
import flwr.supernode.cli
import flwr.supernode.runtime
from client_sdk.client_app import make_client_app
from client_sdk.device_app import open_device
make_client_app(open_device)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
