# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.job import load_job

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
JOBS = sorted(EXAMPLES.glob("*.toml"))
DIGITS = (
    "lora", "head", "full", "ssf", "adapter", "one-bit-adapter", "one-bit-lora", "prompt"
)  # fmt: skip


def test_examples_hold_a_job_for_every_method() -> None:
    names = {path.stem for path in JOBS}
    assert {f"digits-{method}" for method in DIGITS} <= names
    assert {"fashion-lora", "debian-lora"} <= names


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_example_is_a_valid_job_named_like_its_file(path: Path) -> None:
    job = load_job(path)
    assert job.job.name == path.stem
    assert path.stem.endswith(job.method.name)


def test_digits_jobs_differ_in_method_and_training_only() -> None:
    jobs = [load_job(EXAMPLES / f"digits-{method}.toml") for method in DIGITS]
    assert len({(job.data, job.backbone, job.job.seed, job.rounds) for job in jobs}) == 1
    assert {job.method.name for job in jobs} == set(DIGITS)
