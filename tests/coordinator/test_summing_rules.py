# SPDX-License-Identifier: Apache-2.0
"""What secure sums do not go with, each refused with the reason and what to take instead."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from aggregation.codecs import CODEC_NAMES, codec_named
from coordinator.errors import JobError
from coordinator.job import Job
from coordinator.privacy_section import PrivacySection
from coordinator.sections import (
    AggregationSection,
    DataSection,
    RoundsSection,
    SimulationSection,
    UpdateSection,
)
from coordinator.summing_rules import reach_faults
from protocol.tensors import ParamSpec

GOOD: dict[str, Any] = {
    "privacy": PrivacySection(secure_aggregation=True),
    "update": UpdateSection(codec="grid:8,1.0"),
    "aggregation": AggregationSection(weighting="uniform"),
}
WEIGHTED = AggregationSection(weighting="samples", full_weight_samples=100)
EXAMPLES = {
    "int8": "int8", "int4": "int4", "one-bit": "one-bit", "ternary": "ternary:0.1",
    "top-k": "top-k:0.1", "random-k": "random-k:0.1", "low-rank": "low-rank:2",
    "seed-scalars": "seed-scalars:8", "float32": "float32", "float16": "float16",
    "bfloat16": "bfloat16",
}  # fmt: skip


def test_a_job_of_sums_is_a_job() -> None:
    assert Job(**GOOD).privacy.terms is not None
    assert Job().privacy.terms is None


def test_a_job_of_weighted_sums_is_a_job_and_no_private_one() -> None:
    assert Job(**{**GOOD, "aggregation": WEIGHTED})
    with pytest.raises(JobError, match="larger than the noise hides"):
        Job(**{**GOOD, "aggregation": WEIGHTED, "privacy": private()})


def test_every_codec_is_known_here() -> None:
    assert EXAMPLES.keys() | {"grid", "votes"} == set(CODEC_NAMES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_codecs_that_cannot_be_summed_are_refused_with_one_that_can(name: str) -> None:
    with pytest.raises(JobError) as caught:
        Job(**{**GOOD, "update": UpdateSection(codec=EXAMPLES[name])})
    text = str(caught.value)
    assert "update.codec" in text and "can be summed: " in text
    assert '"grid:' in text or '"votes:' in text


@pytest.mark.parametrize("codec", ["one-bit", "ternary:0.1"])
def test_what_to_take_instead_is_not_refused_either(codec: str) -> None:
    """Votes want error feedback, which private jobs refuse: there they go without."""
    secure = GOOD["privacy"]
    private = PrivacySection(
        secure_aggregation=True, mode="central", noise_multiplier=1.0, sampling="all", delta=1e-3
    )
    for privacy, metrics in ((secure, "loss"), (private, "")):
        options = {**GOOD, "privacy": privacy, "data": DataSection(held_out=0.0)}
        with pytest.raises(JobError) as caught:
            Job(**{**options, "update": UpdateSection(codec=codec, metrics=metrics)})
        advice = str(caught.value).partition("take ")[2]
        name = advice.split('"')[1].replace("NORM", "0.1")
        feedback = "update.error_feedback = true" in advice
        assert feedback == (privacy is secure)
        taken = UpdateSection(codec=name, metrics=metrics, error_feedback=feedback)
        assert Job(**{**options, "update": taken}).privacy.terms is not None


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"aggregation": AggregationSection(weighting="uniform", merger="median")}, "merger"),
        ({"aggregation": AggregationSection()}, "aggregation.full_weight_samples"),
        ({"aggregation": WEIGHTED, "update": UpdateSection(codec="votes:1.0")}, "update.codec"),
        ({"rounds": RoundsSection(mode="async")}, "rounds.mode"),
        ({"rounds": RoundsSection(clients_per_round=2)}, "privacy.min_survivors"),
        ({"data": DataSection(clients=2)}, "privacy.min_survivors"),
        ({"simulation": SimulationSection(backend="ray")}, "simulation.backend"),
    ],
)
def test_what_needs_single_updates_is_refused(change: dict[str, Any], key: str) -> None:
    with pytest.raises(JobError, match=key):
        Job(**{**GOOD, **change})


MEDIAN = AggregationSection(weighting="uniform", merger="masked-geometric-median:0.5")
HALF = UpdateSection(codec="grid:8,0.5")


def test_a_job_of_a_masked_median_is_a_job() -> None:
    assert Job(**{**GOOD, "aggregation": MEDIAN, "update": HALF})
    up = replace(MEDIAN, factors="up")
    assert Job(**{**GOOD, "aggregation": up, "update": HALF})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"privacy": PrivacySection()}, 'aggregation.merger = .*"geometric-median" finds'),
        ({"update": UpdateSection(codec="grid:4,1.0")}, 'update.codec = .*expected "grid:4,0.5"'),
        ({"update": UpdateSection(codec="votes:0.5")}, 'update.codec = .*expected "grid:8,0.5"'),
        ({"update": UpdateSection(codec="grid:8,0.5,0.1")}, 'update.codec = .*"grid:8,0.5"'),
        (
            {"update": UpdateSection(codec="grid:8,0.5", error_feedback=True)},
            "update.error_feedback = .*another centre",
        ),
        (
            {"update": UpdateSection(codec="grid:8,0.5", downlink="changes")},
            "update.downlink = .*sent whole",
        ),
        (
            {"aggregation": replace(MEDIAN, weighting="samples", full_weight_samples=9)},
            "aggregation.weighting = .*by their distance",
        ),
        ({"rounds": RoundsSection(mode="async")}, "rounds.mode"),
    ],
)
def test_what_a_masked_median_cannot_do_without_is_asked_for(
    change: dict[str, Any], words: str
) -> None:
    with pytest.raises(JobError) as caught:
        Job(**{**GOOD, "aggregation": MEDIAN, "update": HALF, **change})
    assert re.search(words, str(caught.value))


def test_a_private_job_has_no_median() -> None:
    with pytest.raises(JobError, match=r"aggregation\.merger"):
        Job(**{**GOOD, "aggregation": MEDIAN, "update": HALF, "privacy": private()})


def private(**fields: Any) -> PrivacySection:
    return PrivacySection(
        secure_aggregation=True, mode="central", noise_multiplier=1.0, sampling="all", **fields
    )


def job_of(privacy: PrivacySection) -> Job:
    return Job(
        **{
            **GOOD,
            "privacy": privacy,
            "data": DataSection(held_out=0.0),
            "update": UpdateSection(codec="grid:8,1.0", metrics=""),
        }
    )


def test_noise_is_for_all_that_a_rounded_update_can_be() -> None:
    spec = ParamSpec.of({"a": np.zeros(3000, "f4")})
    (fault,) = reach_faults(job_of(private(clip=1.0)), spec)
    assert fault.key == "privacy.clip"
    codec = codec_named("grid:8,1.0")
    least = codec.reach(spec)  # type: ignore[attr-defined]
    assert 1.0 < least < 1.06 and f"{least:.6g}" in fault.allowed
    assert not reach_faults(job_of(private(clip=1.06)), spec)
    clear = replace(job_of(private(clip=1.0)), privacy=replace(private(), secure_aggregation=False))
    assert not reach_faults(clear, spec), "there the server cuts each update again"


def test_a_norm_that_moves_needs_single_updates() -> None:
    with pytest.raises(JobError, match=r"privacy\.clip_quantile"):
        job_of(private(clip_quantile=0.5))
