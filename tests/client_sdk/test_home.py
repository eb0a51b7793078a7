# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from client_sdk.errors import IdentityError, RunningError, SettingsError
from client_sdk.gateway import Address
from client_sdk.home import Home
from client_sdk.identity import Identity
from client_sdk.settings import Settings


@pytest.fixture
def home(tmp_path: Path) -> Home:
    Identity(tmp_path / "device").key()
    return Home(tmp_path / "device")


def test_what_is_kept_comes_back(home: Home) -> None:
    assert home.settings() is None and home.last() == {} and home.split_port("ab") == 0
    home.set_coordinator(Address("::1", 8443))
    home.set_settings(Settings(data="/data"))
    home.note("survey", {"job": "ab"})
    home.note("work", {"job": "cd"})
    assert home.coordinator() == ("::1", 8443)
    assert home.settings() == Settings(data="/data")
    assert home.last() == {"survey": {"job": "ab"}, "work": {"job": "cd"}}


def test_ports_of_the_latest_jobs_are_remembered(home: Home) -> None:
    for number in range(70):
        home.set_split_port(f"{number:064x}", 1000 + number)
    home.set_split_port(f"{69:064x}", 5)
    assert home.split_port(f"{69:064x}") == 5
    assert home.split_port(f"{10:064x}") == 1010 and home.split_port(f"{2:064x}") == 0


def test_what_cannot_be_read_says_what_to_do(home: Home) -> None:
    with pytest.raises(IdentityError, match=r"coordinator\.json: expected where .* enrol this"):
        home.coordinator()
    (home.folder / "coordinator.json").write_text('{"host": "a"}')
    with pytest.raises(IdentityError, match="enrol this device"):
        home.coordinator()
    (home.folder / "settings.json").write_text('{"hours": "x"}')
    with pytest.raises(SettingsError, match=r"settings\.json: settings: expected data"):
        home.settings()
    home.note("work", {})
    (home.work / "last.json").write_text("half")
    assert home.last() == {}


def test_one_process_runs_a_device(home: Home) -> None:
    assert home.runner() is None
    with home.running():
        assert home.runner() == os.getpid()
        with (
            pytest.raises(RunningError, match=f"process {os.getpid()} runs this device; stop it"),
            home.running(),
        ):
            pass
        with pytest.raises(RunningError, match="stop it first"):
            home.leave()
    assert home.runner() is None


def test_a_process_that_was_killed_runs_nothing(home: Home) -> None:
    code = (
        "import os, sys; from pathlib import Path; from client_sdk.home import Home\n"
        "with Home(Path(sys.argv[1])).running(): os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, home.folder], check=False)
    assert done.returncode == -9
    assert home.runner() is None
    with home.running():
        pass


def test_leaving_removes_all_that_was_made(home: Home) -> None:
    home.set_coordinator(Address("host", 1))
    home.set_settings(Settings(data="/data"))
    home.note("work", {})
    for folder in (home.bundles / "ab", home.memory("ab"), home.flower / "commands"):
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(b"x")
    (home.folder / ".settings.json.0123abcd.partial").write_bytes(b"of a crash")
    home.leave()
    assert not home.folder.exists()
    home.leave()


def test_leaving_leaves_what_is_others(home: Home) -> None:
    home.note("work", {})
    (home.folder / "notes").write_text("mine")
    (home.work / "more").write_text("mine")
    home.leave()
    assert sorted(os.listdir(home.folder)) == ["notes", "work"]
    assert os.listdir(home.work) == ["more"]


@pytest.mark.parametrize("name", ["settings.json", "coordinator.json", "work"])
def test_what_was_there_before_is_not_written_over(served: Any, tmp_path: Path, name: str) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / name).write_text("mine")
    with pytest.raises(IdentityError, match=rf"{name}: expected nothing of that name"):
        served.enrolled(mine)
    assert os.listdir(mine) == [name] and (mine / name).read_text() == "mine"
