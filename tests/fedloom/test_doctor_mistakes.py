# SPDX-License-Identifier: Apache-2.0
"""Each of the twelve mistakes is made, and `fedloom doctor` finds it and says a mend."""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from client_sdk.errors import ClockError, DeniedError
from client_sdk.gateway import Address, Gateway
from client_sdk.home import Home
from client_sdk.identity import Identity
from client_sdk.settings import Settings as DeviceSettings
from client_sdk.settings import unpack_settings
from coordinator.deployment import Deployment, Settings
from coordinator.up import _write_server
from fedloom.cli import main
from fedloom.doctor import MISTAKES, Check, State
from fedloom.doctor import coordinator as of_coordinator
from fedloom.doctor import device as of_device
from fedloom.doctor import files as of_files
from fedloom.doctor.coordinator import examine_coordinator
from fedloom.doctor.device import examine_device

ROOT = Path(__file__).parents[2]


def the(checks: list[Check], number: int) -> Check:
    """The check of a mistake; whatever is not well comes with a mend."""
    assert all(bool(check.mend) == (check.state is not State.OK) for check in checks), checks
    names = [check.name for check in checks]
    assert len(set(names)) == len(names)
    (found,) = [check for check in checks if f" {number}: {MISTAKES[number]}" in check.name]
    return found


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    found = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return found


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    port, split, operator, superlink = free_ports(4)
    settings = Settings(
        name="ward", addresses=("127.0.0.1",), port=port, split_port=split,
        operator_port=operator, superlink_port=superlink,
    )  # fmt: skip
    with Deployment.create(tmp_path / "ward", settings) as made:
        yield made


@pytest.fixture
def device(tmp_path: Path, deployment: Deployment) -> Path:
    """The folder of a member with data; its coordinator is not up."""
    folder = tmp_path / "bed"
    _enrol(deployment, folder)
    np.savez(tmp_path / "data.npz", images=np.zeros((9, 8, 8), np.uint8), labels=np.arange(9) % 3)
    Home(folder).set_coordinator(Address("127.0.0.1", deployment.settings.port))
    Home(folder).set_settings(DeviceSettings(data=str(tmp_path / "data.npz")))
    return folder


def _enrol(deployment: Deployment, folder: Path, **versions: str) -> str:
    identity = Identity(folder)
    request = identity.enrol_request(
        deployment.enrolment.create_token("bed"),
        versions={"fedloom": "0.1.0", "flwr": "1.41.0", **versions},
    )
    answer = deployment.enrolment.enrol(request)
    return identity.join(answer, fingerprint=deployment.authority.fingerprint).device


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`answers(check)`: the coordinator's port is there, and `Gateway.check` does this."""

    def set_up(check: Callable[[Any], float] = lambda _: 0.2) -> None:
        monkeypatch.setattr(of_device, "_handshake", lambda *_: None)
        monkeypatch.setattr(Gateway, "check", check)

    return set_up


def raises(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def test_nothing_is_found_where_no_mistake_was_made(
    deployment: Deployment, device: Path, answers: Callable[..., None]
) -> None:
    answers()
    for checks in (examine_coordinator(deployment.folder), examine_device(device)):
        # Nothing runs here, which is the one thing to say.
        assert {c.name.partition(": ")[2] for c in checks if c.state is not State.OK} == {"running"}


def test_both_folders_are_looked_at_by_one_command(
    deployment: Deployment, device: Path, answers: Callable[..., None],
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from fedloom import doctor

    monkeypatch.setattr(doctor, "examine_machine", list)
    answers()
    command = ["doctor", "--coordinator", str(deployment.folder), "--device", str(device)]
    assert main([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["healthy"] and len(document["checks"]) == 7 + 12
    (device / "key.pem").chmod(0o644)
    assert main(command) == 1
    assert "mend: chmod -R go=" in capsys.readouterr().out


def test_1_init_that_was_cut_off(deployment: Deployment) -> None:
    (deployment.folder / "deployment.toml").unlink()
    found = the(examine_coordinator(deployment.folder), 1)
    assert found.state is State.FAIL and "cut off" in found.found and "it goes on" in found.mend
    missing = the(examine_coordinator(deployment.folder / "none"), 1)
    assert missing.state is State.FAIL and "coordinator init" in missing.mend


def test_1_settings_that_cannot_be_read(deployment: Deployment) -> None:
    (deployment.folder / "deployment.toml").write_text("name = ")
    assert "expected TOML" in the(examine_coordinator(deployment.folder), 1).found


def test_1_enrolment_that_was_cut_off(tmp_path: Path) -> None:
    Identity(tmp_path / "bed").key()
    found = the(examine_device(tmp_path / "bed"), 1)
    assert found.state is State.FAIL and "begun and not finished" in found.found
    assert "device enroll" in found.mend
    assert "found none" in the(examine_device(tmp_path / "none"), 1).found


@pytest.mark.parametrize("name", ["signing.pem", "authority/authority.key", "registry.sqlite", "."])
def test_2_files_that_others_may_read(deployment: Deployment, name: str) -> None:
    (deployment.folder / name).chmod(0o755)
    found = the(examine_coordinator(deployment.folder), 2)
    assert found.state is State.FAIL and "chmod -R go=" in found.mend


def test_2_folder_of_another_account(
    deployment: Deployment, device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 12_345)
    for checks in (examine_coordinator(deployment.folder), examine_device(device)):
        found = the(checks, 2)
        assert found.state is State.FAIL and "12345's" in found.found and "sudo -u" in found.mend


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_2_files_that_root_made(deployment: Deployment) -> None:
    os.chown(deployment.folder / "registry.sqlite", 12_345, -1)
    found = the(examine_coordinator(deployment.folder), 2)
    assert found.state is State.FAIL and "registry.sqlite" in found.found
    assert found.mend.startswith("chown -R root")


@pytest.mark.parametrize(("free", "state"), [(1 << 30, State.WARN), (1 << 20, State.FAIL)])
def test_3_disk_nearly_full(
    deployment: Deployment, device: Path, free: int, state: State,
    monkeypatch: pytest.MonkeyPatch, answers: Callable[..., None],
) -> None:  # fmt: skip
    answers()
    monkeypatch.setattr(of_files.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    for checks in (examine_coordinator(deployment.folder), examine_device(device)):
        assert the(checks, 3).state is state


def test_4_flower_out_of_bounds_here(
    deployment: Deployment, device: Path, monkeypatch: pytest.MonkeyPatch,
    answers: Callable[..., None],
) -> None:  # fmt: skip
    answers()
    for module in (of_coordinator, of_device):
        monkeypatch.setattr(module, "flower_version", lambda: "1.43.0")
    for checks in (examine_coordinator(deployment.folder), examine_device(device)):
        found = the(checks, 4)
        assert found.state is State.FAIL and "found 1.43.0" in found.found
        assert "pip install" in found.mend


@pytest.mark.parametrize(("versions", "words"), [
    ({"fedloom": "0.4.2"}, "has fedloom 0.4.2; as 1 of 2"),
    ({"flwr": "1.40.0"}, "expected >=1.41,<1.43, found 1.40.0"),
])  # fmt: skip
def test_4_device_of_another_release(
    deployment: Deployment, device: Path, tmp_path: Path, versions: dict[str, str], words: str
) -> None:
    name = _enrol(deployment, tmp_path / "old", **versions)
    found = the(examine_coordinator(deployment.folder), 4)
    assert found.state is State.WARN and words in found.found and name in found.found
    deployment.enrolment.revoke(name)
    assert the(examine_coordinator(deployment.folder), 4).state is State.OK


def _say_processes(deployment: Deployment, restarts: int, pid: int | None) -> None:
    """As a supervisor would whose child this test is."""
    logs = deployment.folder / "logs"
    logs.mkdir(exist_ok=True)
    parts = {
        "superlink": {"pid": os.getpid(), "restarts": 0},
        "gateway": {"pid": pid, "restarts": restarts},
    }
    said = {"supervisor": os.getppid(), "processes": parts}
    (logs / "processes.json").write_text(json.dumps(said))
    (logs / "gateway.log").write_text(
        "coordinator.errors.GatewayError: cannot be listened on\n"
        "2026-01-01T00:00:00Z supervisor: ended: exit code 1\n"
    )


@pytest.mark.parametrize(("restarts", "alive", "state"), [
    (0, True, State.OK), (3, True, State.WARN), (1, False, State.FAIL),
])  # fmt: skip
def test_5_part_that_does_not_stay_up(
    deployment: Deployment, restarts: int, alive: bool, state: State
) -> None:
    _say_processes(deployment, restarts, os.getpid() if alive else None)
    found = the(examine_coordinator(deployment.folder), 5)
    assert found.state is state
    if state is not State.OK:
        assert "gateway" in found.found and "cannot be listened on" in found.found
        assert "gateway.log" in found.mend


def test_5_nothing_runs(deployment: Deployment, device: Path, answers: Callable[..., None]) -> None:
    answers()
    assert "coordinator up" in the(examine_coordinator(deployment.folder), 5).mend
    assert "device run" in the(examine_device(device), 5).mend


@pytest.mark.parametrize("which", ["port", "split_port", "operator_port", "superlink_port"])
def test_6_port_taken_by_another_process(deployment: Deployment, which: str) -> None:
    taken = getattr(deployment.settings, which)
    with socket.create_server(("127.0.0.1", taken)):
        found = the(examine_coordinator(deployment.folder), 6)
    assert found.state is State.FAIL and f"{which} {taken}" in found.found
    assert f"sport = :{taken}" in found.mend


def test_6_nobody_answers(deployment: Deployment, device: Path) -> None:
    _say_processes(deployment, 0, os.getpid())
    found = the(examine_coordinator(deployment.folder), 6)
    assert found.state is State.FAIL and "operator_port" in found.found
    found = the(examine_device(device), 6)
    assert found.state is State.FAIL and "no answer" in found.found


def test_7_certificate_does_not_name_the_address(deployment: Deployment) -> None:
    _write_server(deployment, "gateway", ("127.0.0.1",))
    assert the(examine_coordinator(deployment.folder), 7).state is State.OK
    _write_server(deployment, "gateway", ("old.example", "10.1.2.3"))
    found = the(examine_coordinator(deployment.folder), 7)
    assert found.state is State.FAIL and "not 127.0.0.1" in found.found
    assert "start the deployment again" in found.mend


def test_7_address_is_not_this_machines_any_more(deployment: Deployment) -> None:
    path = deployment.folder / "deployment.toml"
    path.write_text(path.read_text().replace("127.0.0.1", "192.0.2.7"))
    found = the(examine_coordinator(deployment.folder), 7)
    assert found.state is State.WARN and "192.0.2.7" in found.found and "addresses" in found.mend


def test_7_device_uses_an_address_that_is_not_in_the_certificate(
    deployment: Deployment, device: Path
) -> None:
    """Over a real handshake."""
    import threading

    _write_server(deployment, "gateway", ("old.example",))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    servers = deployment.folder / "server"
    context.load_cert_chain(servers / "gateway.pem", servers / "gateway.key")
    with socket.create_server(("127.0.0.1", deployment.settings.port)) as listening:

        def serve() -> None:
            accepted, _ = listening.accept()
            with accepted, pytest.raises(ssl.SSLError):
                context.wrap_socket(accepted, server_side=True)

        thread = threading.Thread(target=serve)
        thread.start()
        found = the(examine_device(device), 7)
        thread.join(10)
    assert found.state is State.FAIL and "127.0.0.1" in found.found
    assert "deployment.toml" in found.mend


def test_8_clock_is_off(device: Path, answers: Callable[..., None]) -> None:
    answers(lambda _: 4.0)
    assert the(examine_device(device), 8).state is State.WARN
    answers(raises(ClockError("clock off by 900 s: this device is behind")))
    found = the(examine_device(device), 8)
    assert found.state is State.FAIL and "900 s" in found.found and "timedatectl" in found.mend


@pytest.mark.parametrize(("days", "state"), [(5, State.WARN), (8, State.FAIL)])
def test_9_device_that_did_not_run_for_days(
    device: Path, days: int, state: State, monkeypatch: pytest.MonkeyPatch,
    answers: Callable[..., None],
) -> None:  # fmt: skip
    answers()
    later = time.time() + days * 86_400
    monkeypatch.setattr(of_device.time, "time", lambda: later)
    found = the(examine_device(device), 9)
    assert found.state is state
    assert ("device run" if state is State.WARN else "ask the operator for a token") in found.mend


def test_10_device_was_revoked(device: Path, answers: Callable[..., None]) -> None:
    answers(raises(DeniedError("it does not let this device in: this device was revoked")))
    found = the(examine_device(device), 10)
    assert found.state is State.FAIL and "revoked" in found.found
    assert "device leave" in found.mend


def test_11_data_that_cannot_be_opened(
    device: Path, tmp_path: Path, answers: Callable[..., None]
) -> None:
    answers()
    assert "9 samples" in the(examine_device(device), 11).found
    (tmp_path / "data.npz").write_bytes(b"no archive")
    found = the(examine_device(device), 11)
    assert found.state is State.FAIL and "data.npz" in found.found and "--data" in found.mend
    (device / "settings.json").unlink()
    assert "no data were named" in the(examine_device(device), 11).found


def test_11_data_that_do_not_fit_the_job(
    device: Path, answers: Callable[..., None], make_bundle: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    from client_sdk.bundle_cache import BundleCache

    answers()
    made = make_bundle("head")
    monkeypatch.setattr(BundleCache, "opened", lambda *_: made.bundle)
    Home(device).note("survey", {"job": made.job.hash()})
    assert "they fit job" in the(examine_device(device), 11).found
    np.savez(tmp_path / "data.npz", images=np.zeros((9, 8, 8), np.uint8), labels=np.arange(9) + 70)
    found = the(examine_device(device), 11)
    assert found.state is State.FAIL and "70" in found.found


@pytest.mark.parametrize(("conditions", "words"), [
    ({"command": "/no/such/program"}, "waits for ever"),
    ({"least_free_memory_mb": 1 << 29}, "MiB free are asked for"),
])  # fmt: skip
def test_12_conditions_that_never_hold(
    device: Path, conditions: dict[str, Any], words: str, answers: Callable[..., None]
) -> None:
    answers()
    path = device / "settings.json"
    settings = json.loads(path.read_bytes())
    settings["conditions"] |= conditions
    path.write_text(json.dumps(settings))
    unpack_settings(path.read_bytes())
    found = the(examine_device(device), 12)
    assert found.state is State.FAIL and words in found.found and "device run" in found.mend


def test_12_conditions_that_do_not_hold_just_now_are_no_mistake(
    device: Path, answers: Callable[..., None]
) -> None:
    answers()
    path = device / "settings.json"
    settings = json.loads(path.read_bytes())
    settings["conditions"] |= {"command": "sh -c 'echo not now; exit 1'"}
    path.write_text(json.dumps(settings))
    found = the(examine_device(device), 12)
    assert found.state is State.OK and "not now" in found.found


def test_the_page_lists_the_mistakes_by_their_numbers() -> None:
    page = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", page, flags=re.MULTILINE)
    assert {int(number): name for number, name in rows} == MISTAKES
    assert len(MISTAKES) == 12
