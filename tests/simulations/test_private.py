# SPDX-License-Identifier: Apache-2.0
"""Private jobs as whole simulations: what they leave behind says what they spent."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.errors import JobError
from coordinator.job import Job
from coordinator.journal import Journal
from coordinator.privacy_section import PrivacySection
from coordinator.sections import AggregationSection, RoundsSection, SimulationSection, UpdateSection
from reports.run_record import read_run
from simulations.backends.play import simulated_seed
from simulations.run import simulate


def private(tiny_job: Callable[..., Any], **changes: Any) -> Job:
    job: Job = tiny_job(
        "ssf",
        update=UpdateSection(metrics=""),
        aggregation=AggregationSection(weighting="uniform"),
        rounds=RoundsSection(count=3),
        simulation=SimulationSection(backend="sequential"),
    )
    section = PrivacySection(mode="central", **{"epsilon": 20.0, "sampling": "all", **changes})
    return replace(job, data=replace(job.data, held_out=0.0), privacy=section)


@pytest.fixture(scope="module")
def finished(
    tiny_job: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Job, Path, dict[str, Any]]:
    """A run whose budget ends it early."""
    job = private(tiny_job, noise_multiplier=0.8, epsilon=9.0)
    out = tmp_path_factory.mktemp("runs") / "private"
    return job, out, simulate(job, out)


def test_the_files_of_a_run_say_what_was_spent(finished: Any) -> None:
    job, out, summary = finished
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == summary["rounds"] == 2 < job.rounds.count
    spent = [line["privacy"]["epsilon"] for line in lines]
    assert 0 < spent[0] < spent[1] <= 9.0
    privacy = summary["privacy"]
    assert privacy["epsilon"] == spent[-1]
    assert (privacy["rounds"], privacy["rounds_wanted"]) == (2, 3)
    assert privacy["left"] == pytest.approx(9.0 - spent[-1])
    assert privacy["epsilon_rdp"] >= privacy["epsilon"]
    notes = " ".join(summary["notes"])
    assert "the privacy budget of epsilon = 9 is used up: rounds 3 to 3 are not played" in notes
    assert "the guarantee is that of the same job with secret seeds" in notes
    assert summary["accuracy"] is not None
    record = read_run(out)
    assert [line.epsilon for line in record.rounds] == spent
    assert {line.clip for line in record.rounds} == {0.1}
    page = (out / "report.html").read_text()
    for words in ("Differential privacy of clients", "Privacy spent", "Clipping norm"):
        assert words in page
    assert "Updates that were not clipped" not in page


def test_the_same_run_again_has_the_same_bits(finished: Any, tmp_path: Path) -> None:
    job, out, summary = finished
    again = simulate(job, tmp_path / "again")
    assert again["privacy"] == summary["privacy"]
    finals = []
    for folder in (out, tmp_path / "again"):
        with Journal(folder / "journal.sqlite") as journal:
            tensors = journal.tensors(job.hash(), 2)
        assert tensors
        finals.append({name: value.tobytes() for name, value in tensors.items()})
    assert finals[0] == finals[1]


def test_a_budget_that_cannot_be_met_is_refused_before_any_data_are_touched(
    tiny_job: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simulations.run.set_up", lambda *_: pytest.fail("data were touched"))
    job = private(tiny_job, noise_multiplier=0.5, epsilon=0.1)
    with pytest.raises(JobError, match=r"privacy\.epsilon = 0\.1"):
        simulate(job, tmp_path / "no")


def test_seeds_of_a_simulation_are_those_of_job_and_round(tiny_job: Callable[..., Any]) -> None:
    job = private(tiny_job)
    other = replace(job, job=replace(job.job, seed=7))
    seeds = {simulated_seed(which, number) for which in (job, other) for number in (1, 2)}
    assert len(seeds) == 4 and {len(seed) for seed in seeds} == {32}
    assert simulated_seed(job, 1) == simulated_seed(private(tiny_job), 1)
