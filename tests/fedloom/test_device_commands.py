# SPDX-License-Identifier: Apache-2.0
"""`fedloom device run|status|leave` on a member's folder; nobody is asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client_sdk.device import Device
from client_sdk.gateway import Address
from client_sdk.identity import Identity
from coordinator.deployment import Deployment, Settings
from fedloom.cli import main
from fedloom.errors import BAD_INPUT, DONE


@pytest.fixture
def home(tmp_path: Path) -> Path:
    settings = Settings(name="ward", addresses=("localhost",))
    with Deployment.create(tmp_path / "deployment", settings) as deployment:
        identity = Identity(tmp_path / "device")
        request = identity.enrol_request(deployment.enrolment.create_token("bed"))
        answer = deployment.enrolment.enrol(request)
        identity.join(answer, fingerprint=deployment.authority.fingerprint)
    Device(tmp_path / "device").home.set_coordinator(Address("localhost", 8443))
    return tmp_path / "device"


@pytest.fixture(autouse=True)
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Device]]:
    """Devices that were run, for no time."""
    noted: list[Device] = []
    monkeypatch.setattr(Device, "run", lambda device: noted.append(device))
    yield noted


@pytest.fixture
def source(tmp_path: Path) -> Path:
    np.savez(tmp_path / "own.npz", images=np.zeros((5, 8, 8), np.uint8), labels=np.arange(5))
    return tmp_path / "own.npz"


def told(home: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    capsys.readouterr()
    assert main(["device", "status", "--dir", str(home), "--json"]) == DONE
    return json.loads(capsys.readouterr().out)


def test_what_is_given_to_run_is_remembered(
    home: Path, source: Path, runs: list[Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(source.parent)
    run = ["device", "run", "--dir", str(home)]
    first = ["--data", source.name, "--held-out", "0.2", "--hours", "22:00-06:00", "--threads", "2"]
    assert main([*run, *first]) == DONE
    second = ["--power", "mains", "--battery", "40", "--metered", "refused", "--memory", "512"]
    assert main([*run, *second, "--function", "own.py:now", "--unknown", "work"]) == DONE
    assert main(run) == DONE
    settings = runs[-1].home.settings()
    assert settings is not None and len(runs) == 3
    assert (settings.data, settings.held_out) == (str(source), 0.2)
    conditions = settings.conditions
    assert (conditions.hours, conditions.threads, conditions.power) == ("22:00-06:00", 2, "mains")
    assert conditions.function == f"{source.parent}/own.py:now" and conditions.unknown == "work"
    assert main([*run, "--hours", ""]) == DONE
    again = runs[-1].home.settings()
    assert again is not None and again.conditions.hours == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "say so once, with --data"),
        (["--data", "nowhere"], "no such file or folder"),
        (["--data", "a:b", "--held-out", "2"], "held_out: expected a share of 0 to below 1"),
        (["--data", "a:b", "--hours", "noon"], "hours: expected"),
        (["--data", "a:b", "--power", "sun"], "power: expected any or mains"),
    ],
)
def test_settings_that_cannot_be_meant_are_bad_input(
    home: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["device", "run", "--dir", str(home), *arguments]) == BAD_INPUT
    assert said in capsys.readouterr().err


def test_status_says_what_there_is_to_know(
    home: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told(home, capsys)["data"] is None
    main(["device", "run", "--dir", str(home), "--data", str(source), "--hours", "00:00-00:01"])
    device = Device(home)
    device.home.note(
        "work",
        {
            "when": 0, "seconds": 1.25, "job": "ab" * 32, "round": 3, "task": "fit",
            "refused": "NotNowError: it is noon",
        },
    )  # fmt: skip
    found = told(home, capsys)
    assert found["url"] == "https://localhost:8443" and found["certificate_valid"]
    assert found["running"] is None and found["outbox"] == found["bundles"] == []
    assert (found["data"]["samples"], found["data"]["faults"]) == (5, [])
    assert found["last_work"]["round"] == 3 and found["last_survey"] is None
    assert main(["device", "status", "--dir", str(home)]) == DONE
    text = capsys.readouterr().out
    assert "running      no" in text and "5 samples to train on" in text
    assert "job abababababab, round 3, fit, in 1.2 s, refused: NotNowError: it is noon" in text
    source.unlink()
    assert main(["device", "status", "--dir", str(home)]) == DONE
    assert "no such file or folder" in capsys.readouterr().out


def test_leaving_removes_all_of_it_but_not_while_it_runs(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device = Device(home)
    with device.home.running():
        assert main(["device", "leave", "--dir", str(home)]) == BAD_INPUT
        assert "stop it first" in capsys.readouterr().err
        assert device.home.runner() is not None
    assert main(["device", "leave", "--dir", str(home)]) == DONE
    assert not home.exists()
    assert main(["device", "status", "--dir", str(home)]) == BAD_INPUT
    assert "enrol with: fedloom device enroll" in capsys.readouterr().err
