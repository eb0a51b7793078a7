# SPDX-License-Identifier: Apache-2.0
"""Rounds that are about a part of the tensors, and compressed both ways, on every local backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from coordinator.sections import (
    AggregationSection,
    RoundsSection,
    SimulationSection,
    TrainingSection,
    UpdateSection,
)

ROUNDS = RoundsSection(count=3, evaluate_every=3, evaluate_clients_every=1)
COHORT, IN_TURN = (
    SimulationSection(backend="cohort", cohort_size=2),
    SimulationSection(backend="sequential"),
)


def same(some: Any, others: Any) -> None:
    assert some.keys() == others.keys()
    for name, value in some.items():
        np.testing.assert_allclose(value, others[name], rtol=0, atol=1e-5, err_msg=name)


def part(tensors: Any, word: str) -> dict[str, np.ndarray]:
    return {name: value for name, value in tensors.items() if word in name}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("aggregation", "still"),
    [
        (AggregationSection(merger="ffa-lora"), "lora_A"),
        (AggregationSection(merger="median", factors="up"), "lora_A"),
        (AggregationSection(merger="rolora"), ""),
        (AggregationSection(merger="fedsa-lora"), "lora_B"),
        (AggregationSection(merger="flexlora"), ""),
    ],
    ids=lambda value: value.merger if isinstance(value, AggregationSection) else None,
)
def test_cohorts_and_clients_in_turn_agree(
    play_rounds: Callable[..., Any], aggregation: AggregationSection, still: str
) -> None:
    options = {"aggregation": aggregation, "rounds": ROUNDS}
    first = play_rounds(simulation=COHORT, **options)
    second = play_rounds(simulation=IN_TURN, **options)
    plain = play_rounds(simulation=COHORT, rounds=ROUNDS)
    same(first.tensors, second.tensors)
    for one, other in zip(first.reports, second.reports, strict=True):
        assert not one.rejections
        assert one.per_client_accuracy == other.per_client_accuracy
        assert (one.uplink_bytes, one.downlink_bytes) == (other.uplink_bytes, other.downlink_bytes)
    if still:
        untouched = play_rounds(
            simulation=COHORT, rounds=RoundsSection(count=1),
            aggregation=aggregation,
        )  # fmt: skip
        # What nobody shares is as the bundle has it, after one round and after three.
        same(part(first.tensors, still), part(untouched.tensors, still))
        assert first.reports[0].uplink_bytes < plain.reports[0].uplink_bytes
        assert first.reports[0].downlink_bytes < plain.reports[0].downlink_bytes


@pytest.mark.slow
def test_factors_take_turns(play_rounds: Callable[..., Any]) -> None:
    rolora = AggregationSection(merger="rolora")
    one, two = (
        play_rounds(
            simulation=COHORT, aggregation=rolora, rounds=RoundsSection(count=count)
        ).tensors
        for count in (1, 2)
    )
    same(part(one, "lora_B"), part(two, "lora_B"))
    assert any(not np.array_equal(value, two[name]) for name, value in part(one, "lora_A").items())


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["one-bit", "ternary:0.1,mean", "int8", "random-k:0.2"])
def test_compressed_rounds_agree_on_cohorts_and_in_turn(
    play_rounds: Callable[..., Any], codec: str
) -> None:
    update = UpdateSection(
        codec=codec, error_feedback=True, downlink="changes", downlink_codec=codec
    )
    played = [
        play_rounds(simulation=simulation, rounds=ROUNDS, update=update)
        for simulation in (COHORT, COHORT, IN_TURN)
    ]
    for name, value in played[0].tensors.items():
        assert value.tobytes() == played[1].tensors[name].tobytes(), "two runs differ"
    plain = play_rounds(simulation=COHORT, rounds=ROUNDS)
    for run in played:
        assert not any(report.rejections for report in run.reports)
        assert run.reports[0].uplink_bytes < plain.reports[0].uplink_bytes
    # A code may flip where two engines differ in the last bit, so that only nearness is asked.
    for name, value in played[0].tensors.items():
        assert np.abs(value - played[2].tensors[name]).max() < 0.05


@pytest.mark.slow
def test_clients_held_near_the_start_agree_on_cohorts_and_in_turn(
    play_rounds: Callable[..., Any],
) -> None:
    training = TrainingSection(learning_rate=0.05, batch_size=4, proximal=5.0)
    options = {"training": training, "rounds": RoundsSection(count=2)}
    same(
        play_rounds(simulation=COHORT, **options).tensors,
        play_rounds(simulation=IN_TURN, **options).tensors,
    )
