# SPDX-License-Identifier: Apache-2.0
"""Tensors that clients keep, adapters of their own, and pools: on every local backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from coordinator.errors import JobError
from coordinator.sections import (
    AggregationSection,
    PersonalSection,
    RoundsSection,
    SimulationSection,
    TrainingSection,
    UpdateSection,
)

ROUNDS = RoundsSection(count=3, evaluate_clients_every=1)
COHORT = SimulationSection(backend="cohort", cohort_size=2)
IN_TURN = SimulationSection(backend="sequential")
WITH_TORCH = SimulationSection(backend="sequential", engine="torch")
COHORT_OF_TORCH = SimulationSection(backend="cohort", engine="torch", cohort_size=2)
POOL = {"elements": 5, "selected": 2}


def near(some: Any, other: Any) -> None:
    assert some.keys() == other.keys()
    for name, value in some.items():
        np.testing.assert_allclose(value, other[name], rtol=0, atol=2e-5, err_msg=name)


@pytest.mark.slow
def test_personal_tensors_never_travel_and_personal_adapters_are_tested(
    play_rounds: Callable[..., Any],
) -> None:
    personal = PersonalSection(tensors="classifier.*", report=True, mix=0.25)
    options = {"rounds": ROUNDS, "personal": personal}
    runs = [play_rounds(simulation=s, **options) for s in (COHORT, IN_TURN, COHORT_OF_TORCH)]
    plain = play_rounds(simulation=COHORT, rounds=ROUNDS)
    first = runs[0]
    for run in runs[1:]:
        near(first.tensors, run.tensors)
        for one, other in zip(first.reports, run.reports, strict=True):
            for which in ("per_client_accuracy", "per_client_local", "per_client_mixed"):
                assert getattr(one, which) == pytest.approx(getattr(other, which)), which
            assert one.uplink_bytes == other.uplink_bytes
    last = first.reports[-1]
    assert not last.rejections and len(last.per_client_local) == len(last.per_client_mixed) == 5
    assert last.uplink_bytes < plain.reports[-1].uplink_bytes
    # Nobody told the coordinator of a classifier: it has the bundle's.
    once = play_rounds(simulation=COHORT, rounds=RoundsSection(count=1), personal=personal).tensors
    for name in ("classifier.weight", "classifier.bias"):
        np.testing.assert_array_equal(first.tensors[name], once[name])
    assert not plain.reports[-1].per_client_local


def test_a_pattern_of_no_tensor_is_told(
    make_setup: Callable[..., Any], sign_setup: Any, tmp_path: Any
) -> None:
    for pattern, words in (("nothing*", "is none of"), ("*", "leave none")):
        setup = make_setup("head", personal=PersonalSection(tensors=pattern))
        with pytest.raises(JobError, match=words):
            sign_setup(setup, tmp_path / words)


@pytest.mark.slow
@pytest.mark.parametrize(
    "merger", ["weighted-mean", pytest.param("counted-pool", marks=pytest.mark.long)]
)
def test_pools_agree_on_all_backends_and_are_counted(
    play_rounds: Callable[..., Any], merger: str
) -> None:
    options = {
        "method": "fedins",
        "settings": POOL,
        "training": TrainingSection(learning_rate=0.05, batch_size=4),
        "rounds": ROUNDS,
        "update": UpdateSection(metrics="loss,selected"),
        "aggregation": AggregationSection(merger=merger, weighting="uniform"),
    }
    first = play_rounds(simulation=COHORT, **options)
    for simulation in (IN_TURN, WITH_TORCH, COHORT_OF_TORCH):
        other = play_rounds(simulation=simulation, **options)
        near(first.tensors, other.tensors)
        for one, two in zip(first.reports, other.reports, strict=True):
            assert one.selected == two.selected
            assert one.per_client_accuracy == pytest.approx(two.per_client_accuracy)
    for report in first.reports:
        assert sum(map(sum, report.selected.values())) == 2 * report.samples
        used = {j for row in report.selected.values() for j, count in enumerate(row) if count}
        assert ("selected by nobody" in report.note) == (len(used) < 5)
    silent = play_rounds(
        simulation=COHORT,
        **{**options, "update": UpdateSection(), "aggregation": AggregationSection()},
    )
    assert not silent.reports[0].selected, "counts leave a client only where the job asks for them"
