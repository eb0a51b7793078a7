# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.bundles import recipe_of
from coordinator.errors import JobError
from coordinator.job import dump_job, parse_job
from protocol.example_privacy import ExamplePrivacy

HERE = Path(__file__).parent
PRIVATE = """\
[data]
held_out = 0.0

[training]
batch_size = 8
local_steps = 5

[update]
metrics = ""

[rounds]
count = 4
min_samples = 40

[example_privacy]
noise_multiplier = 1.5
clip = 0.7
delta = 1e-4
"""


def test_private_job_says_what_a_device_may_be_asked_for() -> None:
    job = parse_job(PRIVATE, folder=HERE)
    assert recipe_of(job, 10).training.privacy == ExamplePrivacy(
        noise_multiplier=1.5, clip=0.7, fewest_samples=40, steps=5, rounds=4
    )
    assert parse_job(dump_job(job), folder=HERE) == job


@pytest.mark.parametrize(
    "override", ["noise_multiplier=1.6", "clip=0.8", "delta=2e-4", "max_epsilon=90"]
)
def test_every_key_is_part_of_the_jobs_hash(override: str) -> None:
    other = parse_job(PRIVATE, [f"example_privacy.{override}"], folder=HERE)
    assert other.hash() != parse_job(PRIVATE, folder=HERE).hash()


def test_job_without_noise_is_not_private_and_free_in_all_else() -> None:
    overrides = ["example_privacy.noise_multiplier=0", "data.held_out=0.5"]
    job = parse_job(PRIVATE, overrides, folder=HERE)
    assert recipe_of(job, 10).training.privacy is None


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        (["method.name=sfprompt", "simulation.backend=sequential"], "method.name", "split network"),
        (
            ["training.scaffold=true", "aggregation.weighting=uniform"],
            "training.scaffold",
            "control variates",
        ),
        (["training.local_steps=0"], "training.local_steps", "samples drawn anew"),
        (["training.local_epochs=2"], "training.local_epochs", "no passes"),
        (["rounds.min_samples=7"], "rounds.min_samples", "at least training.batch_size = 8"),
        (["rounds.mode=async"], "rounds.mode", "known beforehand"),
        (["update.metrics=loss"], "update.metrics", "without noise"),
        (["data.held_out=0.2"], "data.held_out", "without noise"),
        (["example_privacy.delta=0.025"], "example_privacy.delta", "less than 0.025"),
        (["example_privacy.delta=0"], "example_privacy.delta", ">= 1e-10"),
        (["example_privacy.clip=0"], "example_privacy.clip", "> 0"),
        (["example_privacy.noise_multiplier=-1"], "example_privacy.noise_multiplier", ">= 0"),
        (
            ["example_privacy.noise_multiplier=0", "example_privacy.max_epsilon=3"],
            "example_privacy.max_epsilon",
            "there is no noise",
        ),
    ],
)
def test_what_would_break_the_promise_is_refused_with_the_reason(
    overrides: list[str], key: str, words: str
) -> None:
    with pytest.raises(JobError) as caught:
        parse_job(PRIVATE, overrides, folder=HERE)
    (fault,) = [fault for fault in caught.value.faults if fault.key == key]
    assert words in fault.allowed


def test_pull_towards_the_first_tensors_is_allowed() -> None:
    assert parse_job(PRIVATE, ["training.proximal=0.1"], folder=HERE).training.proximal == 0.1
