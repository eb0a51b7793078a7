# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest

from fedloom import doctor
from fedloom.cli import main
from fedloom.doctor import Check, State, examine, machine, within


def test_examine_looks_at_every_subject_once() -> None:
    checks = examine()
    names = [check.name for check in checks]
    assert len(set(names)) == len(names)
    assert {"python", "core packages", "extra device", "threads", "onnxruntime", "disk"} <= {*names}
    # Whatever is not well comes with a mend, whatever is well without.
    assert all(bool(check.mend) == (check.state is not State.OK) for check in checks)


def test_threads_are_warned_about_when_omp_forces_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("reports.machine.usable_cores", lambda: 8)
    check = machine._threads()
    assert check.state is State.WARN
    assert "OMP_NUM_THREADS" in check.mend


def test_package_out_of_bounds_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "1.40.0")
    check = machine._group("device", [("flwr", ">=1.41,<1.43")])
    assert check.state is State.WARN
    assert "flwr>=1.41,<1.43" in check.found
    assert check.mend == "pip install 'fedloom[device]'"


def test_missing_core_package_is_a_failure() -> None:
    check = machine._group("core", [("no-such-distribution-of-ours", ">=1")])
    assert check.state is State.FAIL


def test_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    check = machine._writable("home", tmp_path / "absent", mend="set HOME")
    assert check.state is State.WARN
    assert "absent" in check.found


@pytest.mark.parametrize(
    ("version", "bounds", "expected"),
    [
        ("1.41.0", ">=1.41,<1.43", True),
        ("1.43.0", ">=1.41,<1.43", False),
        ("1.9.0", ">=1.41", False),
        ("2.13.0+cpu", "==2.13.0", True),
        ("2.13.1", "==2.13.0", False),
        ("5.0", "", True),
    ],
)
def test_bounds_are_read_as_pip_reads_them(version: str, bounds: str, expected: bool) -> None:
    assert within(version, bounds) is expected


@pytest.mark.parametrize(("state", "code"), [(State.WARN, 0), (State.FAIL, 1)])
def test_command_fails_only_when_a_check_fails(
    state: State,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = [Check(name="disk", state=state, found="0.1 GiB free", mend="free some")]
    monkeypatch.setattr(doctor, "examine", lambda **_: found)
    assert main(["doctor"]) == code
    assert "mend: free some" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == code
    document = json.loads(capsys.readouterr().out)
    assert document["healthy"] is (code == 0)
    assert document["checks"][0]["state"] == str(state)
