# SPDX-License-Identifier: Apache-2.0
"""Asynchronous rounds over simulated clients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from coordinator.sections import RoundsSection, SimulationSection

ROUNDS = RoundsSection(
    mode="async", count=4, buffer=3, concurrency=4, evaluate_every=2, evaluate_clients_every=2
)


@pytest.mark.parametrize("backend", ["sequential", "cohort"])
def test_simulated_clients_play_asynchronous_rounds(
    play_rounds: Callable[..., Any], backend: str
) -> None:
    section = SimulationSection(backend=backend, cohort_size=2 if backend == "cohort" else 0)
    first = play_rounds(rounds=ROUNDS, simulation=section)
    assert [report.updates for report in first.reports] == [3] * 4
    assert [bool(report.per_client_accuracy) for report in first.reports] == [
        False, True, False, True,
    ]  # fmt: skip
    assert not any(report.rejections for report in first.reports)
    # Four work at a time and three make a step, so that some are of the step before.
    assert max(report.staleness_max for report in first.reports) == 1
    if backend == "cohort":
        return
    again = play_rounds(rounds=ROUNDS, simulation=section)
    for name, value in first.tensors.items():
        assert value.tobytes() == again.tensors[name].tobytes(), "the same run, the same bits"


def test_one_step_of_all_fresh_updates_is_a_synchronous_round(
    play_rounds: Callable[..., Any],
) -> None:
    section = SimulationSection(backend="sequential")
    one = RoundsSection(count=1)
    stepped = play_rounds(rounds=RoundsSection(count=1, mode="async", buffer=5), simulation=section)
    played = play_rounds(rounds=one, simulation=section)
    for name, value in played.tensors.items():
        np.testing.assert_allclose(stepped.tensors[name], value, atol=1e-6)
