# SPDX-License-Identifier: Apache-2.0
"""How SuperLink is started and asked; it is really run in gateway/test_real_superlink.py."""

from __future__ import annotations

import subprocess
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from coordinator.errors import SuperLinkError
from coordinator.superlink import Nodes, Runs, SuperLink
from protocol.node_headers import node_public_key

KEY = node_public_key(ec.generate_private_key(ec.SECP256R1()).public_key())


@pytest.fixture
def superlink(tmp_path: Path) -> SuperLink:
    return SuperLink(
        folder=tmp_path,
        port=4321,
        certificate=tmp_path / "server.pem",
        key=tmp_path / "server.key",
        authority=tmp_path / "ca.pem",
    )


def test_command_is_loopback_with_tls_and_known_nodes_only(superlink: SuperLink) -> None:
    command = superlink.command()
    line = " ".join(command.argv)
    assert "--host 127.0.0.1 --port 4321" in line
    assert "--enable-supernode-auth" in line and "--insecure" not in line
    assert "--disable-runtime-dependency-installation" in line
    wanted = {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_HOME": str(superlink.folder / "flwr"),
    }
    assert wanted.items() <= command.environment.items()


def test_connection_is_written_for_flowers_commands(superlink: SuperLink) -> None:
    superlink.prepare()
    superlink.prepare()
    found = tomllib.loads((superlink.folder / "flwr" / "config.toml").read_text())
    assert found["superlink"]["default"] == "fedloom"
    assert found["superlink"]["fedloom"] == {
        "address": "127.0.0.1:4321",
        "root-certificates": str(superlink.authority),
    }


def test_a_run_is_asked_for_by_the_name_of_a_job(superlink: SuperLink, flwr: Any) -> None:
    flwr.out = '{"success": true, "run-id": "18446744073709551615"}'
    assert Runs(superlink).start("digits-lora") == 2**64 - 1
    assert flwr.asked[:3] == ("run", str(superlink.folder / "app"), "fedloom")
    assert 'job="digits-lora"' in flwr.asked


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's own use
def test_the_app_of_runs_is_one_that_flower_takes(superlink: SuperLink) -> None:
    from flwr.cli.build import build_fab_from_disk
    from flwr.cli.config_utils import load_and_validate

    superlink.prepare()
    app = superlink.folder / "app"
    config, warnings = load_and_validate(app / "pyproject.toml")
    assert not warnings and config["tool"]["flwr"]["app"]["config"] == {"job": ""}
    assert (app / "fedloom_app.py").read_text() == "nothing = None\n"
    assert len(build_fab_from_disk(app)) < 5_000


def test_its_own_programs_come_first(superlink: SuperLink, tmp_path: Path) -> None:
    ours = replace(superlink, programs=tmp_path / "bin", variables={"FEDLOOM_X": "1"})
    environment = ours.command().environment
    assert environment["PATH"].split(":")[0] == str(tmp_path / "bin")
    assert environment["FEDLOOM_X"] == "1"
    assert "FEDLOOM_X" not in ours.environment(), "Flower's commands need none of it"


def test_relative_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SuperLinkError, match="expected absolute paths"):
        SuperLink(
            folder=Path("here"), port=1, certificate=tmp_path, key=tmp_path, authority=tmp_path
        )


@pytest.fixture
def flwr(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What `flwr` is made to answer, and what it was asked."""

    class Flwr:
        code, out, err = 0, "", ""
        asked: tuple[str, ...] = ()

        def __call__(self, command: list[str], **_: Any) -> Any:
            self.asked = tuple(command[1:])
            if self.code == 99:
                raise subprocess.TimeoutExpired(command, 1)
            return subprocess.CompletedProcess(command, self.code, self.out, self.err)

    made = Flwr()
    monkeypatch.setattr(subprocess, "run", made)
    return made


def test_answers_are_read_behind_words_for_people(superlink: SuperLink, flwr: Any) -> None:
    flwr.out = 'Using SuperLink {x}\n{\n "success": true,\n "node-id": "12345678901234567890"\n}\n'
    assert Nodes(superlink).register(KEY, name="ada") == 12345678901234567890
    assert flwr.asked[:2] == ("supernode", "register")
    assert flwr.asked[3:] == ("--name", "ada", "fedloom", "--format", "json")
    flwr.out = '{"success": true, "nodes": [{"node-id": "5", "status": "online"}]}'
    assert [(node.node_id, node.status) for node in Nodes(superlink).all()] == [(5, "online")]


def test_failures_say_what_flower_said(superlink: SuperLink, flwr: Any) -> None:
    nodes = Nodes(superlink)
    flwr.out = '{"success": false, "error-message": "Using X\\n\\n[code: 23] already in use."}'
    with pytest.raises(SuperLinkError, match=r"flwr supernode register: .*\[code: 23\] already"):
        nodes.register(KEY)
    flwr.code, flwr.out, flwr.err = 1, "", "Traceback\nboom"
    with pytest.raises(SuperLinkError, match="flwr supernode unregister: Traceback boom"):
        nodes.unregister(3)
    flwr.err = ""
    with pytest.raises(SuperLinkError, match="no word why"):
        nodes.all()
    flwr.code = 99
    with pytest.raises(SuperLinkError, match=r"no answer in 60 s from SuperLink at 127\.0\.0\.1"):
        nodes.all()
    with pytest.raises(SuperLinkError, match="expected a node's public key in PEM"):
        nodes.register(b"nothing")
