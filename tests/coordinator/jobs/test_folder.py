# SPDX-License-Identifier: Apache-2.0
"""A job's folder: what it says, and who plays it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from coordinator.errors import DeploymentError
from coordinator.jobs.folder import JobFolder, JobState


def test_what_was_said_is_read_back(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    assert folder.state() == JobState() and folder.state().doing == "queued"
    state = JobState(
        doing="training", round=2, rounds=5, asked=("a", "b"), answered=("a",),
        not_asked={"c": "it is not connected"}, since=12.5,
    )  # fmt: skip
    folder.say(state)
    assert folder.state() == state
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(DeploymentError, match="cannot be read"):
        folder.state()


def test_one_process_plays_and_a_killed_one_plays_no_more(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    code = (
        "import sys, time; from pathlib import Path\n"
        "from coordinator.jobs.folder import JobFolder\n"
        "with JobFolder(Path(sys.argv[1])).playing() as mine:\n"
        "    print(mine, flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "True\n"
        assert folder.is_played()
        with folder.playing(patience_s=0.2) as mine:
            assert not mine
        os.kill(other.pid, signal.SIGKILL)
        with folder.playing(patience_s=10) as mine:
            assert mine
            assert folder.is_played()
    assert not folder.is_played()
