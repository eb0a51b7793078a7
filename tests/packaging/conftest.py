# SPDX-License-Identifier: Apache-2.0
"""The files of packaging/, read strictly: what is not known here is an error."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import typer

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "packaging"

# Of Dockerfile's reference: those that we use, and what follows each.
_INSTRUCTIONS = {
    "FROM": re.compile(r"[\w.:/-]+( AS [a-z]+)?"),
    "ARG": re.compile(r"[A-Z_]+"),  # without a default: what is not given is not set
    "WORKDIR": re.compile(r"/[\w/.-]*"),
    "RUN": re.compile(r".+"),
    "COPY": re.compile(r"(--from=[a-z]+ )?[\w./-]+( [\w./-]+)+"),
    "ENV": re.compile(r"[A-Z_]+=\S+( [A-Z_]+=\S+)*"),
    "USER": re.compile(r"[a-z]+"),
    "VOLUME": re.compile(r"/[\w/.-]+"),
    "EXPOSE": re.compile(r"\d+( \d+)*"),
    "STOPSIGNAL": re.compile(r"SIG[A-Z]+"),
    "CMD": re.compile(r'\["[^"]+"(, "[^"]+")*\]'),
}


@dataclass(frozen=True)
class Instruction:
    word: str
    rest: str


@pytest.fixture
def read_dockerfile() -> Callable[[str], list[list[Instruction]]]:
    """The stages of a Dockerfile. Raises: AssertionError for whatever is not in `_INSTRUCTIONS`."""

    def read(name: str) -> list[list[Instruction]]:
        text = (FOLDER / name).read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        stages: list[list[Instruction]] = []
        for line in re.sub(r"\s*\\\n\s*", " ", "\n".join(lines)).splitlines():
            if not line:
                continue
            word, _, rest = line.partition(" ")
            assert word in _INSTRUCTIONS, f"{name}: expected {', '.join(_INSTRUCTIONS)}: {line}"
            assert _INSTRUCTIONS[word].fullmatch(rest), f"{name}: cannot be read: {line}"
            if word == "FROM":
                stages.append([])
            assert stages, f"{name}: expected FROM first, found {line}"
            stages[-1].append(Instruction(word, rest))
        return stages

    return read


_ON_OFF = re.compile(r"yes|no")
_NUMBER = re.compile(r"\d+")
_SIZE = re.compile(r"\d+[KMG]?")
_TEXT = re.compile(r".+")
_MODE = re.compile(r"0[0-7]{3}")
# Of systemd.unit, .service, .exec, .kill and .resource-control: the keys that we use.
UNIT_KEYS = {
    "Unit": {
        "Description": _TEXT, "Wants": _TEXT, "After": _TEXT,
        "ConditionPathExists": re.compile(r"/.+"), "StartLimitIntervalSec": _NUMBER,
        "StartLimitBurst": _NUMBER,
    },
    "Service": {
        "Type": re.compile("exec"), "User": _TEXT, "Group": _TEXT,
        "StateDirectory": re.compile(r"[^/].*"), "StateDirectoryMode": _MODE,
        "WorkingDirectory": re.compile(r"/.+"), "Environment": re.compile(r"[A-Z_]+=\S+"),
        "EnvironmentFile": re.compile(r"/.+"), "ExecStartPre": _TEXT, "ExecStart": _TEXT,
        "Restart": re.compile("on-failure|always"), "RestartSec": _NUMBER,
        "RestartPreventExitStatus": _NUMBER, "KillMode": re.compile("mixed|control-group"),
        "TimeoutStartSec": _NUMBER, "TimeoutStopSec": _NUMBER, "UMask": re.compile("0077"),
        "LimitNOFILE": _NUMBER, "TasksMax": _NUMBER, "MemoryHigh": _SIZE, "MemoryMax": _SIZE,
        "Nice": re.compile(r"-?\d+"), "IOSchedulingClass": re.compile("idle|best-effort"),
        "NoNewPrivileges": re.compile("yes"), "CapabilityBoundingSet": re.compile(""),
        "AmbientCapabilities": re.compile(""), "ProtectSystem": re.compile("strict"),
        "ProtectHome": re.compile("yes|read-only"), "PrivateTmp": re.compile("yes"),
        "PrivateDevices": _ON_OFF, "ProtectClock": _ON_OFF, "ProtectControlGroups": _ON_OFF,
        "ProtectHostname": _ON_OFF, "ProtectKernelLogs": _ON_OFF, "ProtectKernelModules": _ON_OFF,
        "ProtectKernelTunables": _ON_OFF, "ProtectProc": re.compile("invisible"),
        "RestrictAddressFamilies": re.compile(r"AF_\w+( AF_\w+)*"), "RestrictNamespaces": _ON_OFF,
        "RestrictRealtime": _ON_OFF, "RestrictSUIDSGID": _ON_OFF, "LockPersonality": _ON_OFF,
        "SystemCallArchitectures": re.compile("native"),
        "SystemCallFilter": re.compile("@system-service"),
    },
    "Install": {"WantedBy": re.compile("multi-user.target")},
}  # fmt: skip


@pytest.fixture
def read_unit() -> Callable[[str], dict[str, dict[str, str]]]:
    """The sections of a unit. Raises: AssertionError for a section, key or value not known."""

    def read(name: str) -> dict[str, dict[str, str]]:
        found: dict[str, dict[str, str]] = {}
        section = ""
        for line in (FOLDER / name).read_text(encoding="utf-8").splitlines():
            if not line or line.startswith("#"):
                continue
            if match := re.fullmatch(r"\[(\w+)\]", line):
                section = match[1]
                assert section in UNIT_KEYS and section not in found, f"{name}: {line}"
                found[section] = {}
                continue
            key, sign, value = line.partition("=")
            assert sign and section, f"{name}: expected KEY=VALUE in a section, found {line}"
            assert key in UNIT_KEYS[section], f"{name}: [{section}] knows no {key}"
            assert key not in found[section], f"{name}: {key} is there twice"
            assert UNIT_KEYS[section][key].fullmatch(value), f"{name}: {line}"
            found[section][key] = value
        assert list(found) == list(UNIT_KEYS), f"{name}: expected {', '.join(UNIT_KEYS)}"
        return found

    return read


@pytest.fixture
def read_compose() -> Callable[[str], dict[str, Any]]:
    """A compose file as YAML has it; a key that is there twice is an error."""
    yaml = pytest.importorskip("yaml")

    class Strict(yaml.SafeLoader):  # type: ignore[misc, name-defined]
        """Refuses a mapping with a key twice."""

    def mapping(loader: Any, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value]
        assert len(set(keys)) == len(keys), f"twice in one mapping: {keys}"
        loader.flatten_mapping(node)
        return yaml.SafeLoader.construct_mapping(loader, node, deep=True)

    Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)

    def read(name: str) -> dict[str, Any]:
        with (FOLDER / name).open(encoding="utf-8") as file:
            found = yaml.load(file, Strict)
        assert isinstance(found, dict)
        return found

    return read


@pytest.fixture
def example() -> dict[str, str]:
    """device.env.example, as systemd and compose both read it: NAME=VALUE, without quotes."""
    lines = (FOLDER / "device.env.example").read_text(encoding="utf-8").splitlines()
    given = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Z_]+=[^\s\"'$]+", line) for line in given)
    return dict(line.split("=", 1) for line in given)


@pytest.fixture
def require_command(
    example: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[list[str]], None]:
    """That `fedloom` takes these words; they are parsed, and not run."""
    from fedloom.cli import app

    for name, value in example.items():
        monkeypatch.setenv(name, value)

    def require(words: list[str]) -> None:
        assert Path(words[0]).name == "fedloom", f"expected a fedloom command, found {words}"
        command: click.Command = typer.main.get_command(app)
        rest = list(words[1:])
        while isinstance(command, click.Group):
            assert rest and rest[0] in command.commands, f"no such command: {shlex.join(words)}"
            command = command.commands[rest.pop(0)]
        try:
            command.make_context(shlex.join(words), rest)
        except click.UsageError as error:
            pytest.fail(f"{shlex.join(words)}: {error.format_message()}")

    return require


@pytest.fixture
def commands(
    read_unit: Callable[[str], dict[str, dict[str, str]]],
    read_compose: Callable[[str], dict[str, Any]],
    read_dockerfile: Callable[[str], list[list[Instruction]]],
) -> dict[str, list[str]]:
    """Every command of every file: `FILE KEY` to its words."""

    def found() -> Iterator[tuple[str, list[str]]]:
        for path in sorted(FOLDER.glob("*.service")):
            for key, value in read_unit(path.name)["Service"].items():
                if key.startswith("Exec"):
                    yield f"{path.name} {key}", shlex.split(value)
        for path in sorted(FOLDER.glob("*.compose.yaml")):
            for name, service in read_compose(path.name)["services"].items():
                yield f"{path.name} {name}", service["command"]
        for path in sorted(FOLDER.glob("Dockerfile.*")):
            (last,) = [each.rest for each in read_dockerfile(path.name)[-1] if each.word == "CMD"]
            yield f"{path.name} CMD", json.loads(last)

    return dict(found())
