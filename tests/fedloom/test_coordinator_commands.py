# SPDX-License-Identifier: Apache-2.0
"""What an operator types, from an empty folder to a revoked device."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from client_sdk.identity import Identity
from coordinator.deployment import Deployment
from fedloom.cli import main


@pytest.fixture
def folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    made = tmp_path / "deployment"
    command = ["coordinator", "init", str(made), "--name", "ward", "--address", "localhost"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "https://localhost:8443" in said
    assert f"token create {made}" in said, "the next command is told"
    return made


def said(capsys: pytest.CaptureFixture[str], *command: object, code: int = 0) -> str:
    assert main(["coordinator", *map(str, command)]) == code
    out = capsys.readouterr()
    return out.out if code == 0 else out.err


def member(folder: Path, capsys: pytest.CaptureFixture[str], home: Path) -> str:
    """A device that enrolled with a token of the command."""
    text = said(capsys, "token", "create", folder, "--label", "bed", "--json")
    told = json.loads(text)
    identity = Identity(home)
    with Deployment(folder) as open_:
        request = identity.enrol_request(told["token"], versions={}, capabilities={})
        answer = open_.enrolment.enrol(request)
    return identity.join(answer, fingerprint=told["fingerprint"]).device


def test_from_a_token_to_a_revoked_device(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no device yet" in said(capsys, "devices", folder)
    name = member(folder, capsys, tmp_path / "device")
    assert name.startswith("bed-")
    (device,) = json.loads(said(capsys, "devices", folder, "--json"))
    assert device["name"] == name and device["revoked"] is None
    assert f"{name}  " in said(capsys, "devices", folder)

    assert said(capsys, "revoke", folder, name, "--why", "lost") == f"{name}: revoked\n"
    assert "was revoked before" in said(capsys, "revoke", folder, name)
    assert "revoked 2" in said(capsys, "devices", folder)
    events = [
        entry["event"] for entry in json.loads(said(capsys, "audit", folder, "--json"))["entries"]
    ]
    assert events == ["token", "enrolled", "revoked"]
    assert "unchanged: 3 entries" in said(capsys, "audit", folder)


def test_a_changed_log_is_told_and_fails(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    member(folder, capsys, tmp_path / "device")
    with sqlite3.connect(folder / "registry.sqlite") as db:
        db.execute("DROP TRIGGER audit_stays")
        db.execute("UPDATE audit SET subject = 'another' WHERE number = 1")
    db.close()
    assert "changed: " in said(capsys, "audit", folder, code=1)


def test_wrong_names_and_folders_are_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "expected one of no device yet, found x" in said(capsys, "revoke", folder, "x", code=2)
    none = tmp_path / "nothing"
    assert f"coordinator init {none}" in said(capsys, "devices", none, code=2)
    long = ["token", "create", folder, "--label", "a", "--hours", 1e6]
    assert "lifetime: expected at most" in said(capsys, *long, code=2)
    bad = ["init", folder, "--name", "b", "--address", "localhost"]
    assert "there is a deployment already" in said(capsys, *bad, code=2)
