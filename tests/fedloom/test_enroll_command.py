# SPDX-License-Identifier: Apache-2.0
"""`fedloom device enroll` by variables, once, and while the coordinator is being started."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from client_sdk import enrolment
from client_sdk.errors import CoordinatorUnreachableError
from fedloom.cli import main
from fedloom.cli.variables import COORDINATOR_VARIABLE, FINGERPRINT_VARIABLE, TOKEN_VARIABLE

MEMBER = SimpleNamespace(device="bed-1", coordinator="ward", signing_key="ab" * 32)


class FakeEnrolment:
    """The coordinator does not answer so often, and then it does."""

    def __init__(self, silent: int = 0) -> None:
        self.silent = silent
        self.asked: list[tuple[object, ...]] = []

    def enroll(self, *arguments: object) -> SimpleNamespace:
        self.asked.append(arguments)
        if len(self.asked) <= self.silent:
            raise CoordinatorUnreachableError("no answer")
        return MEMBER


def test_what_token_create_prints_is_what_enroll_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tmp_path / "ward")
    assert main(["coordinator", "init", folder, "--name", "ward", "--address", "localhost"]) == 0
    capsys.readouterr()
    command = ["coordinator", "token", "create", folder, "--label", "bed"]
    assert main([*command, "--env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = dict(line.split("=", 1) for line in lines)
    assert list(told) == [COORDINATOR_VARIABLE, TOKEN_VARIABLE, FINGERPRINT_VARIABLE]
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    fake = FakeEnrolment()
    monkeypatch.setattr(enrolment, "enroll", fake.enroll)
    assert main(["device", "enroll", "--dir", str(tmp_path / "bed")]) == 0
    assert fake.asked == [(tmp_path / "bed", *told.values())]
    assert main([*command, "--env", "--json"]) == 2
    assert "give one of them" in capsys.readouterr().err


@pytest.mark.parametrize(("wait", "code"), [("30", 0), ("0", 2)])
def test_a_coordinator_that_does_not_answer_yet_is_waited_for_where_asked(
    tmp_path: Path, wait: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeEnrolment(silent=2)
    monkeypatch.setattr(enrolment, "enroll", fake.enroll)
    monkeypatch.setattr("fedloom.cli.device._TRY_AGAIN_S", 0.01)
    told = ["--coordinator", "https://localhost:8443", "--token", "t", "--fingerprint", "ab"]
    command = ["device", "enroll", *told, "--dir", str(tmp_path / "bed"), "--wait", wait]
    assert main(command) == code
    assert len(fake.asked) == (3 if code == 0 else 1)


def test_a_member_does_not_enrol_again_with_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeEnrolment()
    monkeypatch.setattr(enrolment, "enroll", fake.enroll)
    monkeypatch.setattr(
        "client_sdk.identity.Identity", lambda folder: SimpleNamespace(membership=MEMBER)
    )
    told = ["--coordinator", "https://localhost:8443", "--token", "used", "--fingerprint", "ab"]
    command = ["device", "enroll", *told, "--dir", str(tmp_path / "bed")]
    assert main([*command, "--once"]) == 0
    assert not fake.asked and "bed-1" in capsys.readouterr().out
    assert main(command) == 0
    assert len(fake.asked) == 1
