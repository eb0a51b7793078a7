# SPDX-License-Identifier: Apache-2.0
"""The ways to run clients give one result: cohort and sequential, onnxruntime and torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.sections import RoundsSection, SimulationSection


def apart(first: Any, second: Any) -> float:
    assert first.tensors.keys() == second.tensors.keys()
    return max(
        float(np.abs(first.tensors[name] - second.tensors[name]).max()) for name in first.tensors
    )


def bits(played: Any) -> bytes:
    return b"".join(played.tensors[name].tobytes() for name in sorted(played.tensors))


FIVE = RoundsSection(count=5, evaluate_every=5)


@pytest.mark.parametrize(
    "method", ["lora", pytest.param("one-bit-adapter", marks=pytest.mark.long)]
)
def test_cohort_equals_sequential_after_five_rounds(
    play_rounds: Callable[..., Any], method: str
) -> None:
    # 5 clients at most 2 at a time: three cohorts of two, one place of the last one empty.
    cohort = SimulationSection(backend="cohort", cohort_size=2)
    first = play_rounds(method, rounds=FIVE, simulation=cohort)
    again = play_rounds(method, rounds=FIVE, simulation=cohort)
    alone = play_rounds(method, rounds=FIVE, simulation=SimulationSection(backend="sequential"))
    assert bits(first) == bits(again)
    assert apart(first, alone) <= 1e-5
    assert [len(report.rejections) for report in first.reports] == [0] * 5
    last, other = first.reports[-1], alone.reports[-1]
    assert (last.samples, last.updates) == (other.samples, other.updates)
    assert last.per_client_accuracy == pytest.approx(other.per_client_accuracy, abs=1e-5)
    assert last.loss == pytest.approx(other.loss, abs=1e-4)
    assert last.downlink_bytes == other.downlink_bytes


def test_sequential_run_gives_the_same_bits_again(play_rounds: Callable[..., Any]) -> None:
    section = SimulationSection(backend="sequential")
    rounds = RoundsSection(count=2)
    assert bits(play_rounds(rounds=rounds, simulation=section)) == bits(
        play_rounds(rounds=rounds, simulation=section)
    )


@pytest.mark.parametrize("backend", ["sequential", "cohort"])
def test_torch_engine_equals_onnx_engine(play_rounds: Callable[..., Any], backend: str) -> None:
    rounds = RoundsSection(count=2)
    by_torch = play_rounds(
        rounds=rounds, simulation=SimulationSection(backend=backend, engine="torch", cohort_size=2)
    )
    by_onnx = play_rounds(rounds=rounds, simulation=SimulationSection(backend="sequential"))
    assert apart(by_torch, by_onnx) <= 1e-4
    assert by_torch.reports[-1].accuracy == by_onnx.reports[-1].accuracy
    assert by_torch.reports[-1].per_client_accuracy == pytest.approx(
        by_onnx.reports[-1].per_client_accuracy, abs=1e-5
    )


def test_text_clients_train_through_the_same_path(play_rounds: Callable[..., Any]) -> None:
    rounds = RoundsSection(count=2)
    options: dict[str, Any] = {"kind": "text", "optimizer": "adamw", "rounds": rounds}
    played = play_rounds("lora", simulation=SimulationSection(cohort_size=5), **options)
    alone = play_rounds("lora", simulation=SimulationSection(backend="sequential"), **options)
    # Adam divides a gradient by its own size, which doubles what rounding makes of it.
    assert apart(played, alone) <= 5e-5
    assert set(played.reports[-1].per_client_accuracy) == {f"w{number}" for number in range(5)}


def test_few_of_the_clients_are_drawn_for_a_round(play_rounds: Callable[..., Any]) -> None:
    rounds = RoundsSection(count=2, clients_per_round=2)
    cohort = play_rounds(rounds=rounds, simulation=SimulationSection(cohort_size=2))
    alone = play_rounds(rounds=rounds, simulation=SimulationSection(backend="sequential"))
    assert [report.clients for report in cohort.reports] == [2, 2]
    assert apart(cohort, alone) <= 1e-5


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("default::DeprecationWarning")
@pytest.mark.filterwarnings("default::FutureWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_ray_equals_sequential(
    play_rounds: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="needs fedloom[ray]")
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))
    rounds = RoundsSection(count=2)
    by_ray = play_rounds(rounds=rounds, simulation=SimulationSection(backend="ray"))
    alone = play_rounds(rounds=rounds, simulation=SimulationSection(backend="sequential"))
    assert apart(by_ray, alone) <= 1e-5
    assert by_ray.reports[-1].accuracy == alone.reports[-1].accuracy
    assert by_ray.reports[-1].per_client_accuracy == alone.reports[-1].per_client_accuracy
