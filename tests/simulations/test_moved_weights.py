# SPDX-License-Identifier: Apache-2.0
"""Mergers that move frozen weights, and clients of several ranks, on every local backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from coordinator.sections import AggregationSection, RoundsSection, SimulationSection

ROUNDS = RoundsSection(count=3, clients_per_round=4, evaluate_clients_every=1)
ONE = RoundsSection(count=1)
COHORT = SimulationSection(backend="cohort", cohort_size=2)
IN_TURN = SimulationSection(backend="sequential")
WITH_TORCH = SimulationSection(backend="sequential", engine="torch")
COHORT_OF_TORCH = SimulationSection(backend="cohort", engine="torch", cohort_size=2)
RANKS = "2,4,8"


def near(some: Any, other: Any) -> None:
    assert some.keys() == other.keys()
    for name, value in some.items():
        np.testing.assert_allclose(value, other[name], rtol=0, atol=2e-5, err_msg=name)


def losses(run: Any) -> list[float]:
    return [report.loss for report in run.reports]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("merger", "ranks"),
    [
        ("flora", ""),
        ("fedex-lora", ""),
        ("flora", RANKS),
        ("fedex-lora", RANKS),
        ("flexlora", RANKS),
        ("hetlora", RANKS),
    ],
)
def test_all_ways_to_run_clients_agree(
    play_rounds: Callable[..., Any], merger: str, ranks: str
) -> None:
    options = {"aggregation": AggregationSection(merger=merger, ranks=ranks), "rounds": ROUNDS}
    first = play_rounds(simulation=COHORT, **options)
    assert not any(report.rejections for report in first.reports)
    assert bool(first.offset) == (merger in ("flora", "fedex-lora"))
    for simulation in (IN_TURN, WITH_TORCH, COHORT_OF_TORCH):
        other = play_rounds(simulation=simulation, **options)
        near(first.tensors, other.tensors)
        near(first.offset, other.offset)
        for one, two in zip(first.reports, other.reports, strict=True):
            assert one.per_client_accuracy == pytest.approx(two.per_client_accuracy)
            assert (one.uplink_bytes, one.downlink_bytes) == (two.uplink_bytes, two.downlink_bytes)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["", RANKS])
def test_exact_mergers_give_one_model_however_they_write_it(
    play_rounds: Callable[..., Any], ranks: str
) -> None:
    flora, fedex, plain = (
        losses(
            play_rounds(
                simulation=COHORT,
                rounds=ONE,
                aggregation=AggregationSection(merger=merger, ranks=ranks),
            )
        )
        for merger in ("flora", "fedex-lora", "hetlora")
    )
    assert flora == pytest.approx(fedex, abs=1e-5)
    assert flora != pytest.approx(plain, abs=1e-5), "averaging factors apart is not exact"


@pytest.mark.slow
def test_a_client_of_smaller_rank_sends_and_is_sent_less(play_rounds: Callable[..., Any]) -> None:
    whole, small = (
        play_rounds(
            simulation=COHORT,
            rounds=ONE,
            aggregation=AggregationSection(merger="flexlora", ranks=ranks),
        ).reports[0]
        for ranks in ("8", "2")
    )
    assert small.uplink_bytes < whole.uplink_bytes
    assert small.downlink_bytes < whole.downlink_bytes


@pytest.mark.slow
def test_who_took_part_is_sent_the_last_change_and_others_all_of_it(
    play_rounds: Callable[..., Any],
) -> None:
    everybody, few = (
        play_rounds(
            simulation=IN_TURN,
            aggregation=AggregationSection(merger="fedex-lora"),
            rounds=RoundsSection(count=4, clients_per_round=count),
        )
        for count in (5, 2)
    )
    plain = play_rounds(simulation=COHORT, rounds=ONE).reports[0]
    a_client = [report.downlink_bytes / report.clients for report in everybody.reports]
    # Nothing has moved in the first round.
    assert a_client[0] == pytest.approx(plain.downlink_bytes / plain.clients, rel=0.05)
    assert a_client[3] == pytest.approx(a_client[2], rel=0.05)
    assert not any(report.rejections for report in few.reports)
