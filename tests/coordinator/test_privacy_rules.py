# SPDX-License-Identifier: Apache-2.0
"""What a private job may not ask for beside its privacy: each refusal names its key and why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.errors import JobError
from coordinator.job import Job, dump_job, parse_job

HERE = Path(__file__).parent
PRIVATE = """
[data]
held_out = 0.0
[update]
metrics = ""
[aggregation]
weighting = "uniform"
[rounds]
clients_per_round = 5
[privacy]
mode = "central"
epsilon = 8.0
"""


def private(*overrides: str) -> Job:
    return parse_job(PRIVATE, overrides, folder=HERE)


def faults_of(*overrides: str) -> list[str]:
    with pytest.raises(JobError) as caught:
        private(*overrides)
    return [str(replace(fault, line=None)) for fault in caught.value.faults]


def test_a_private_job_is_read_and_written_whole() -> None:
    job = private()
    assert job.privacy.is_private and not Job().privacy.is_private
    assert parse_job(dump_job(job), folder=HERE) == job


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("rounds.quorum=3", "rounds.deadline_s ends a round by the clock"),
        ("rounds.over_selection=1.5", "who is among the first"),
        ("rounds.min_updates=2", "would tell their number"),
        ("aggregation.weighting=samples", "larger than the noise hides"),
        ("aggregation.merger=median", "more influence"),
        ("aggregation.merger=norm-bound:0.1", "more influence"),
        ("aggregation.merger=ffa-lora", 'aggregation.factors = "up"'),
        ("aggregation.merger=counted-pool", "more influence"),
        ("update.metrics=loss", "leaves them without noise"),
        ("update.metrics=selected", "leaves them without noise"),
        ("update.error_feedback=true", "longer than the clipping norm"),
        ("data.held_out=0.2", "without noise"),
        ("training.scaffold=true", "a second release"),
        ("method.name=sfprompt", "hidden states"),
        ("rounds.clients_per_round=0", "above 0"),
        ("privacy.delta=0.05", "less than 1/20"),
        ("privacy.population=4", "expected at least rounds.clients_per_round = 5"),
    ],
)
def test_what_breaks_the_guarantee_is_refused_with_the_reason(override: str, why: str) -> None:
    key = override.partition("=")[0]
    found = [fault for fault in faults_of(override) if fault.startswith(f"{key} = ")]
    assert any(why in fault for fault in found)


def test_asynchronous_rounds_are_refused() -> None:
    found = faults_of("rounds.mode=async", "rounds.clients_per_round=0", "privacy.sampling=all")
    assert any(
        fault.startswith("rounds.mode") and "no accounting covers" in fault for fault in found
    )


def test_tests_by_clients_are_refused() -> None:
    found = faults_of("personal.report=true", "data.held_out=0.2")
    assert {fault.partition(" = ")[0] for fault in found} == {"personal.report", "data.held_out"}


def test_all_clients_are_not_drawn() -> None:
    assert private("privacy.sampling=all", "rounds.clients_per_round=0").privacy.sampling == "all"
    (fault,) = faults_of("privacy.sampling=all")
    assert fault.startswith("rounds.clients_per_round = 5: expected 0")


def test_the_same_keys_are_free_where_nothing_is_promised() -> None:
    for override in ("rounds.quorum=3", "update.metrics=loss", "aggregation.merger=median"):
        parse_job(PRIVATE, [override, "privacy.mode=none", "privacy.epsilon=0"], folder=HERE)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["privacy.epsilon=0"], "privacy.epsilon"),
        (["privacy.mode=none"], "privacy.mode"),
        (["privacy.mode=nobody"], "privacy.mode"),
        (["privacy.delta=0"], "privacy.delta"),
        (["privacy.delta=1e-11"], "privacy.delta"),
        (["privacy.delta=1"], "privacy.delta"),
        (["privacy.clip=0"], "privacy.clip"),
        (["privacy.clip_quantile=1"], "privacy.clip_quantile"),
        (["privacy.sampling=whoever"], "privacy.sampling"),
        (["privacy.epsilon=-1"], "privacy.epsilon"),
        (["privacy.noise_multiplier=-1"], "privacy.noise_multiplier"),
    ],
)
def test_settings_that_promise_nothing_are_refused(overrides: list[str], key: str) -> None:
    assert faults_of(*overrides)[0].startswith(f"{key} = ")


LOCAL = ("privacy.mode=local", "rounds.clients_per_round=0")
SHARED = (
    "privacy.mode=distributed",
    "privacy.secure_aggregation=true",
    "update.codec=grid:8,0.1",
    "rounds.clients_per_round=0",
)


def test_what_is_made_of_updates_that_clients_have_noised_is_free() -> None:
    for override in ("rounds.quorum=3", "rounds.min_updates=2", "aggregation.merger=median"):
        assert private(*LOCAL, override).privacy.mode == "local"
    assert private(*SHARED, "rounds.min_updates=2").privacy.mode == "distributed"


@pytest.mark.parametrize("mode", [LOCAL, SHARED])
@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("aggregation.weighting=samples", "larger than the noise hides"),
        ("update.metrics=loss", "leaves them without noise"),
        ("data.held_out=0.2", "without noise"),
        ("training.scaffold=true", "a second release"),
        ("method.name=sfprompt", "hidden states"),
        ("rounds.mode=async", "no accounting covers"),
        ("privacy.clip_quantile=0.5", "the norm is told to nobody"),
        ("privacy.delta=0.05", "less than 1/20"),
    ],
)
def test_what_breaks_the_guarantee_of_clients_noise_is_refused(
    mode: tuple[str, ...], override: str, why: str
) -> None:
    found = faults_of(*mode, override)
    assert any(f.startswith(override.partition("=")[0]) and why in f for f in found)


@pytest.mark.parametrize(
    ("mode", "override", "why"),
    [
        (LOCAL, "privacy.secure_aggregation=true", '"distributed": in a secure sum a share'),
        (SHARED, "privacy.secure_aggregation=false", "only a share of the noise"),
        (SHARED, "update.codec=votes:0.1", "read as a sum"),
        (SHARED, "aggregation.merger=masked-geometric-median:0.1", "in the sum without noise"),
        (SHARED, "privacy.corrupt=0.15", "more than 3 with 20 clients"),
        (SHARED, "rounds.over_selection=1.5", "all are asked already"),
    ],
)
def test_noise_of_clients_goes_with_sums_that_have_enough_of_it(
    mode: tuple[str, ...], override: str, why: str
) -> None:
    found = faults_of(*mode, override)
    assert any(fault.startswith(override.partition("=")[0]) or why in fault for fault in found)
    assert any(why in fault for fault in found)


def test_every_key_is_part_of_the_job() -> None:
    changes = (
        "privacy.epsilon=4", "privacy.delta=1e-6", "privacy.noise_multiplier=2",
        "privacy.clip=0.5", "privacy.clip_quantile=0.5", "privacy.clip_rate=0.1",
        "privacy.sampling=without-replacement", "privacy.population=30",
    )  # fmt: skip
    assert len({private().hash(), *(private(change).hash() for change in changes)}) == 9
