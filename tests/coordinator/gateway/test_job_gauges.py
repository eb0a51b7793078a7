# SPDX-License-Identifier: Apache-2.0
"""What private jobs have spent, as Prometheus reads it."""

from __future__ import annotations

from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest

from coordinator.gateway.metrics import JobGauges
from coordinator.jobs.folder import JobFolder, JobState
from coordinator.up import spent_by_jobs

SPENT = {
    "epsilon": 2.5, "epsilon_rdp": 2.9, "delta": 1e-5, "budget": 8.0, "left": 5.5,
    "neighbours": "add or remove one", "noise_multiplier": 1.2, "clip": 0.25, "unclipped": None,
}  # fmt: skip


def test_private_jobs_have_gauges_and_others_none(tmp_path: Path) -> None:
    for name, privacy in (("ward", SPENT), ("plain", {})):
        (tmp_path / name).mkdir()
        JobFolder(tmp_path / name).say(JobState(doing="asking", round=3, privacy=privacy))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "state.json").write_text("{")
    registry = CollectorRegistry()
    registry.register(JobGauges(lambda: spent_by_jobs(tmp_path)))
    text = generate_latest(registry).decode()
    assert 'fedloom_job_epsilon{job="ward"} 2.5' in text
    assert 'fedloom_job_left{job="ward"} 5.5' in text
    assert 'fedloom_job_clip{job="ward"} 0.25' in text
    assert "plain" not in text and "broken" not in text
    assert "fedloom_job_unclipped{" not in text, "what is not released is not told"


def test_state_of_an_older_release_has_no_privacy(tmp_path: Path) -> None:
    JobFolder(tmp_path).say(JobState(doing="asking"))
    text = (tmp_path / "state.json").read_text()
    import json

    content = json.loads(text)
    del content["privacy"]
    (tmp_path / "state.json").write_text(json.dumps(content))
    assert JobFolder(tmp_path).state().privacy == {}
