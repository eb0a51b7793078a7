# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.job import load_job

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
JOBS = sorted(EXAMPLES.glob("*.toml"))
DIGITS = (
    "lora", "lora-sb", "head", "full", "ssf", "adapter", "one-bit-adapter", "one-bit-lora",
    "prompt",
)  # fmt: skip


def test_examples_hold_a_job_for_every_method() -> None:
    names = {path.stem for path in JOBS}
    assert {f"digits-{method}" for method in DIGITS} <= names
    assert {"fashion-lora", "debian-lora", "mixed-ranks-lora", "scaffold-lora"} <= names


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_example_is_a_valid_job_named_like_its_file(path: Path) -> None:
    job = load_job(path)
    assert job.job.name == path.stem
    assert path.stem.endswith(job.method.name) or path.stem.startswith("updates-")


def test_digits_jobs_differ_in_method_and_training_only() -> None:
    jobs = [load_job(EXAMPLES / f"digits-{method}.toml") for method in DIGITS]
    assert len({(job.data, job.backbone, job.job.seed, job.rounds) for job in jobs}) == 1
    assert {job.method.name for job in jobs} == set(DIGITS)


def test_jobs_beside_fedins_differ_in_method_merger_and_rate_only() -> None:
    names = (
        "fashion-fedins",
        "fashion-domains-ssf",
        "fashion-domains-lora",
        "fashion-domains-full",
    )
    jobs = [load_job(EXAMPLES / f"{name}.toml") for name in names]
    assert (
        len({(job.data, job.backbone, job.rounds, job.aggregation.weighting) for job in jobs}) == 1
    )
    assert [job.aggregation.merger for job in jobs] == ["counted-pool", *["weighted-mean"] * 3]
    assert len({job.method.name for job in jobs}) == 4
    assert len({replace(job.training, learning_rate=1.0) for job in jobs}) == 1


def test_jobs_beside_sfprompt_have_its_data_and_rounds() -> None:
    names = ("sfprompt", "few-lora", "few-head", "few-full")
    jobs = [load_job(EXAMPLES / f"fashion-{name}.toml") for name in names]
    assert len({(job.data, job.backbone, job.rounds) for job in jobs}) == 1
    assert len({job.method.name for job in jobs}) == 4


def test_updates_jobs_differ_in_how_updates_travel_and_are_merged_only() -> None:
    jobs = [load_job(path) for path in JOBS if path.stem.startswith("updates-")]
    assert len(jobs) == 5
    plain = jobs[0]
    for job in jobs:
        alike = replace(job, job=plain.job, update=plain.update, aggregation=plain.aggregation)
        assert alike == plain
    assert len({(job.update.codec, job.aggregation.merger) for job in jobs}) == 5
