# SPDX-License-Identifier: Apache-2.0
"""`fedloom coordinator submit`, `status`, `logs`, `stop` and `resume`, where nothing is up."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.deployment import Deployment, Settings
from coordinator.job import dump_job
from coordinator.jobs.folder import JobFolder, JobState
from coordinator.jobs.registry import Outcome
from fedloom.cli import main

Said = Callable[..., tuple[int, str, str]]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    def run(*words: object) -> tuple[int, str, str]:
        code = main(["coordinator", *map(str, words)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    settings = Settings(name="ward", addresses=("localhost",))
    Deployment.create(tmp_path / "deployment", settings).close()
    return tmp_path / "deployment"


@pytest.fixture
def job_file(tiny_job: Any, tmp_path: Path, cache_of_the_session: Path) -> Path:
    job = tiny_job("lora")
    path = tmp_path / "wards.toml"
    path.write_text(dump_job(replace(job, job=replace(job.job, name="wards"))))
    return path


def test_from_submission_to_an_end(said: Said, folder: Path, job_file: Path) -> None:
    assert said("status", folder) == (
        0, f"no job yet; next: fedloom coordinator submit {folder} JOB.toml\n", "",
    )  # fmt: skip
    for command in ("stop", "resume", "logs"):
        code, _, err = said(command, folder)
        assert code == 2 and "no job yet" in err
    code, out, err = said("submit", folder, job_file, "--set", "rounds.count=4")
    assert code == 0, err
    assert "job          wards" in out and "status" in out
    code, _, err = said("submit", folder, job_file, "--set", "rounds.count=4")
    assert code == 2 and "was submitted before, as wards" in err

    code, out, _ = said("status", folder, "--json")
    (told,) = json.loads(out)
    assert (told["name"], told["doing"], told["starts"]) == ("wards", "queued", 0)
    known = JobFolder(folder / "jobs" / "wards")
    known.say(JobState(
        doing="training", round=2, rounds=4, asked=("a", "b"), answered=("b",),
        not_asked={"c": "battery: expected 50 %"},
    ))  # fmt: skip
    assert said("status", folder)[1].splitlines() == [
        "wards: training, round 2 of 4",
        "  1 of 2 devices have answered",
        "  at work: a",
        "  c: battery: expected 50 %",
    ]
    assert said("stop", folder)[1] == "wards: is stopped\n"
    assert said("stop", folder)[1] == "wards: was stopped before\n"
    assert said("status", folder)[1].startswith("wards: stopped")
    with known.playing():
        assert said("status", folder)[1].startswith("wards: stopping")
    assert said("resume", folder)[1] == "wards: goes on\n"
    known.say(replace(known.state(), doing="stopped"))
    assert said("status", folder)[1].startswith("wards: queued"), "nobody has begun it again yet"

    code, _, err = said("logs", folder)
    assert code == 2 and "nothing was logged yet" in err
    known.log.write_text("a line\n")
    assert said("logs", folder)[1] == "a line\n"
    with Deployment(folder) as deployment:
        deployment.jobs.end("wards", Outcome.FAILED, "the bundle was changed")
    code, out, _ = said("status", folder, "--follow")
    assert code == 1 and "wards: failed" in out and "the bundle was changed" in out


def test_what_cannot_be_meant_is_said_before_anything_is_compiled(
    said: Said, folder: Path, job_file: Path, tmp_path: Path
) -> None:
    code, _, err = said("submit", folder, job_file, "--set", "rounds.cuont=4")
    assert code == 2 and "rounds.cuont" in err
    code, _, err = said("submit", tmp_path / "none", job_file)
    assert code == 2 and "fedloom coordinator init" in err
    code, _, err = said("submit", folder, job_file, "--name", "../out")
    assert code == 2 and "letters, digits" in err
    code, _, err = said("status", folder, "--job", "none")
    assert code == 2 and "no job yet" in err
    assert not (folder / "jobs").exists()


def test_a_coordinator_needs_no_samples_of_its_own(
    said: Said, folder: Path, job_file: Path
) -> None:
    names = ",".join(f"c{number}" for number in range(10))
    words = ["--set", f"data.classes={names}"]
    code, _, err = said("submit", folder, job_file, *words)
    assert code == 0, err
    known = JobFolder(folder / "jobs" / "wards")
    assert known.samples("test") == {} and known.samples("validation") == {}
    assert f'classes = "{names}"' in known.job.read_text()
    code, _, err = said("submit", folder, job_file, "--set", "data.classes=cat,cat")
    assert code == 2 and "at least two different names" in err
