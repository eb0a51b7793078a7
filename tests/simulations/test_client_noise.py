# SPDX-License-Identifier: Apache-2.0
"""Jobs whose clients add the noise: in shares inside a secure sum, or each to its own update."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregation.privacy.accountant import LocalRound, SummedRound, epsilon_of
from coordinator.errors import JobError
from coordinator.job import Job
from coordinator.journal import Journal
from coordinator.privacy import Privacy
from coordinator.privacy_section import PrivacySection
from coordinator.sections import AggregationSection, RoundsSection, SimulationSection, UpdateSection
from edge_runtime.bundle import open_bundle
from protocol.files import SIGNER_NAME
from simulations.run import simulate


def job_of(tiny_job: Callable[..., Any], mode: str, **changes: Any) -> Job:
    """Two rounds that hardly train: what moves the tensors is noise."""
    shared = mode == "distributed"
    job: Job = tiny_job(
        changes.pop("method", "ssf"),
        update=UpdateSection(metrics="", codec="grid:8,0.9" if shared else "float32"),
        aggregation=AggregationSection(weighting="uniform"),
        rounds=RoundsSection(count=2),
        simulation=SimulationSection(backend=changes.pop("backend", "cohort")),
    )
    section = PrivacySection(
        **{
            "mode": mode,
            "noise_multiplier": 0.5,
            "clip": 1.0,
            "secure_aggregation": shared,
            "corrupt": 0.0,
            **changes,
        }
    )
    training = replace(job.training, learning_rate=1e-9)
    return replace(job, data=replace(job.data, held_out=0.0), privacy=section, training=training)


def played(job: Job, out: Path) -> tuple[dict[str, Any], np.ndarray, int]:
    """Summary, how far the tensors have moved, and clients."""
    summary = simulate(job, out)
    signer = (out / "bundle" / SIGNER_NAME).read_text().strip()
    bundle = open_bundle(out / "bundle", public_key=signer)
    first = bundle.initial()
    with Journal(out / "journal.sqlite") as journal:
        tensors = journal.tensors(job.hash(), 2)
    assert tensors
    moved = np.concatenate([(tensors[name] - first[name]).ravel() for name in sorted(tensors)])
    return summary, moved, summary["clients"]


@pytest.mark.parametrize(("mode", "backend"), [("distributed", "cohort"), ("local", "sequential")])
def test_the_mean_has_the_noise_that_is_accounted_for(
    tiny_job: Callable[..., Any], mode: str, backend: str, tmp_path: Path
) -> None:
    job = job_of(tiny_job, mode, backend=backend)
    summary, moved, clients = played(job, tmp_path / "run")
    privacy = Privacy.of(job)
    assert privacy is not None
    # Each client's noise, over two rounds, in the mean of all clients.
    expected = privacy.share * job.privacy.clip * math.sqrt(clients * 2) / clients
    assert moved.size > 200
    assert moved.std() == pytest.approx(expected, rel=4 / math.sqrt(2 * moved.size))
    if mode == "distributed":
        assert privacy.share == pytest.approx(0.5 / math.sqrt(3))
    else:
        assert privacy.share == 0.5
    kind = {"distributed": SummedRound, "local": LocalRound}[mode]
    told = summary["privacy"]
    assert told["epsilon"] == epsilon_of(kind(multiplier=0.5), 2, 1e-5)
    assert (told["mode"], told["rounds"], "sampling" in told) == (mode, 2, False)
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert 0 < lines[0]["privacy"]["epsilon"] < lines[1]["privacy"]["epsilon"]
    assert {line["samples"] for line in lines} == {clients}, "nobody says how many it has"
    page = (tmp_path / "run" / "report.html").read_text()
    assert ("shares that clients add" if mode == "distributed" else "on each update") in page


def test_a_budget_ends_the_rounds_of_clients_noise_too(
    tiny_job: Callable[..., Any], tmp_path: Path
) -> None:
    one = epsilon_of(LocalRound(multiplier=0.5), 1, 1e-5)
    job = job_of(tiny_job, "local", epsilon=one * 1.01)
    summary = simulate(job, tmp_path / "run")
    assert summary["rounds"] == 1
    assert "rounds 2 to 2 are not played" in " ".join(summary["notes"])


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"clip": 0.9}, r"privacy\.clip"), ({"noise_multiplier": 2e-4}, r"update\.codec")],
)
def test_noise_that_does_not_cover_the_sum_is_refused_before_anybody_is_asked(
    tiny_job: Callable[..., Any], tmp_path: Path, changes: dict[str, float], key: str
) -> None:
    with pytest.raises(JobError, match=key):
        simulate(job_of(tiny_job, "distributed", **changes), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
