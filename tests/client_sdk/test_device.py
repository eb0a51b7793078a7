# SPDX-License-Identifier: Apache-2.0
"""A device that runs: with the real gateway, and a child of a line in SuperNode's place."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import client_sdk
from client_sdk import device as module
from client_sdk import supernode
from client_sdk.conditions import Conditions
from client_sdk.device import Device
from client_sdk.errors import DeniedError, IdentityError, RunningError, SettingsError
from client_sdk.gateway import Gateway
from client_sdk.identity import Identity
from client_sdk.settings import Settings

STARTED = "open('started', 'a').write('x'); import time; "


@pytest.fixture
def device(served: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Device:
    monkeypatch.setattr(module, "_FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(module, "_TICK_S", 0.05)
    made: Device = served.enrolled(tmp_path / "device")
    made.configure(data=tmp_path)
    return made


def eventually(check: Callable[[], Any], within_s: float = 20.0) -> Any:
    end = time.monotonic() + within_s
    while not (found := check()):
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.02)
    return found


@contextmanager
def running(device: Device) -> Iterator[list[BaseException]]:
    raised: list[BaseException] = []

    def run() -> None:
        try:
            device.run()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield raised
    finally:
        device.stop()
        thread.join(20)
        assert not thread.is_alive()


def starts(device: Device) -> int:
    path = device.home.flower / "started"
    return len(path.read_text()) if path.exists() else 0


def test_the_package_offers_it() -> None:
    assert client_sdk.Device is Device and client_sdk.Conditions is Conditions
    with pytest.raises(AttributeError, match="no attribute 'Devices'"):
        client_sdk.Devices  # noqa: B018


def test_enrolment_remembers_where_the_coordinator_is(device: Device, served: Any) -> None:
    assert device.membership is not None and device.membership.coordinator == "ward"
    assert device.home.coordinator() == served.address


def test_settings_are_remembered_and_changed_one_by_one(device: Device, tmp_path: Path) -> None:
    device.configure(held_out=0.3, conditions=Conditions(threads=2))
    device.configure(outbox_mb=7)
    expected = Settings(
        data=str(tmp_path), held_out=0.3, outbox_mb=7, conditions=Conditions(threads=2)
    )
    assert Device(device.home.folder).configure() == expected


def test_what_is_missing_is_said_before_anything_starts(served: Any, tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="enrol with: fedloom device enroll"):
        Device(tmp_path / "nobody").run(data=tmp_path)
    made = served.enrolled(tmp_path / "device")
    with pytest.raises(SettingsError, match=r"--data or Device\.run"):
        made.run()
    with pytest.raises(SettingsError, match="no such file or folder"):
        made.run(data=tmp_path / "missing")


def test_supernode_is_started_again_until_the_device_is_stopped(
    device: Device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supernode, "_PROGRAM", STARTED + "raise SystemExit(3)")
    with caplog.at_level(logging.INFO), running(device) as raised:
        eventually(lambda: starts(device) >= 3)
    assert raised == [] and "SuperNode ended (exit code 3); trying again in" in caplog.text


def test_one_process_runs_a_device(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supernode, "_PROGRAM", STARTED + "time.sleep(100)")
    with running(device):
        eventually(lambda: starts(device))
        assert device.status()["running"] is not None
        other = Device(device.home.folder)
        with pytest.raises(RunningError, match="stop it first"):
            other.run()
        with pytest.raises(RunningError, match="stop it first"):
            other.leave()
    assert device.status()["running"] is None


def test_a_revoked_device_ends_and_says_why(
    device: Device, served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supernode, "_PROGRAM", STARTED + "time.sleep(0.3)")
    with running(device) as raised:
        eventually(lambda: starts(device))
        assert device.membership is not None
        served.deployment.enrolment.revoke(device.membership.device)
        eventually(lambda: raised)
    assert isinstance(raised[0], DeniedError) and "revoked" in str(raised[0])


def test_a_coordinator_that_is_away_is_waited_for(
    device: Device, served: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supernode, "_PROGRAM", STARTED + "time.sleep(100)")
    away = served.address._replace(port=1)
    device.home.set_coordinator(away)
    with running(device):
        eventually(lambda: "is the coordinator up" in caplog.text)
        assert starts(device) == 0
    assert "trying again in" in caplog.text


def test_clock_that_is_nearly_off_is_worth_a_word(
    device: Device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supernode, "_PROGRAM", STARTED + "time.sleep(100)")
    monkeypatch.setattr(Gateway, "check", lambda self: -60.0)
    with running(device):
        eventually(lambda: starts(device))
    assert "clock off by 60 s: this device is behind of the coordinator" in caplog.text


def test_certificate_is_renewed_while_supernode_goes_on(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supernode, "_PROGRAM", STARTED + "time.sleep(100)")
    monkeypatch.setattr(Identity, "renewal_due", lambda self, now: True)
    assert device.membership is not None
    before = device.membership.certificate
    with running(device) as raised:
        eventually(lambda: _certificate(device) != before)
        time.sleep(0.3)
    assert raised == [] and starts(device) == 1


def _certificate(device: Device) -> str:
    held = Identity(device.home.folder).membership
    assert held is not None
    return held.certificate


def test_leaving_removes_everything(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supernode, "_PROGRAM", STARTED + "time.sleep(100)")
    with running(device):
        eventually(lambda: starts(device))
    device.leave()
    assert not device.home.folder.exists()


def test_the_process_that_watches_loads_neither_flower_nor_a_runtime() -> None:
    code = (
        "import sys, client_sdk.device\n"
        "print(sorted({'flwr', 'onnxruntime', 'grpc', 'safetensors', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
