# SPDX-License-Identifier: Apache-2.0
"""Runs whose clients train privately: every way to run them gives the same tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.example_accounting import example_epsilon
from coordinator.sections import AggregationSection, SimulationSection
from simulations.errors import DataError
from simulations.run import simulate

WAYS = {
    "onnx": SimulationSection(backend="sequential"),
    "cohort": SimulationSection(backend="cohort", cohort_size=3),
    "torch": SimulationSection(backend="sequential", engine="torch"),
    "torch-cohort": SimulationSection(backend="cohort", cohort_size=3, engine="torch"),
}


@pytest.fixture(scope="module")
def expected(
    private_options: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory, tiny_job: Any
) -> tuple[Any, Path, dict[str, Any]]:
    """A finished run of clients in turn, each by onnxruntime."""
    job = tiny_job("lora", **private_options(), simulation=WAYS["onnx"])
    out = tmp_path_factory.mktemp("runs") / "private"
    return job, out, simulate(job, out)


def tensors_of(out: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(out / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("way", ["cohort", "torch", "torch-cohort"])
def test_every_way_to_run_clients_gives_the_same_tensors(
    expected: Any, tmp_path: Path, way: str
) -> None:
    job, out, _ = expected
    other = replace(job, simulation=WAYS[way])
    assert other.hash() == job.hash()
    simulate(other, tmp_path / way)
    found, wanted = tensors_of(tmp_path / way), tensors_of(out)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5, err_msg=name)


def test_summary_says_what_it_cost_and_clients_tell_nothing(expected: Any) -> None:
    job, out, summary = expected
    found = summary["example_privacy"]
    assert found["epsilon"] == pytest.approx(example_epsilon(job))
    assert found["steps"] == 6
    assert json.loads((out / "summary.json").read_text())["example_privacy"] == found
    assert any("epsilon" in note for note in summary["notes"])
    assert any("draws batches and noise from the job's seed" in note for note in summary["notes"])
    for line in (out / "metrics.jsonl").read_text().splitlines():
        told = json.loads(line)
        assert told["train_loss"] is None
        assert told["per_client_accuracy"] == {}
        assert told["rejections"] == []
        assert told["updates"] > 0
    assert summary["accuracy"] is not None  # on the coordinator's own samples


def test_clients_that_are_too_small_are_not_asked_and_are_named(
    expected: Any, tmp_path: Path
) -> None:
    job, _, summary = expected
    counts = {client["id"]: client["samples"] for client in summary["per_client"]}
    least = sorted(counts.values())[1]
    small = [name for name, count in counts.items() if count < least]
    assert small
    raised = replace(job, rounds=replace(job.rounds, min_samples=least))
    result = simulate(raised, tmp_path / "raised")
    assert any(note.endswith(f"take no part: {', '.join(small)}") for note in result["notes"])
    first = json.loads((tmp_path / "raised" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["updates"] == len(counts) - len(small)
    with pytest.raises(DataError, match=r"rounds.min_samples = 500: expected 1 or more clients"):
        none = replace(
            job,
            rounds=replace(job.rounds, min_samples=500),
        )
        simulate(none, tmp_path / "none")


def test_run_that_was_cut_off_goes_on_to_the_same_bits(expected: Any, tmp_path: Path) -> None:
    from simulations.progress import SilentProgress

    class Cut(SilentProgress):
        def round(self, report: Any) -> None:
            raise KeyboardInterrupt

    job, out, _ = expected
    with pytest.raises(KeyboardInterrupt):
        simulate(job, tmp_path, progress=Cut())
    simulate(job, tmp_path)
    for name, value in tensors_of(out).items():
        assert value.tobytes() == tensors_of(tmp_path)[name].tobytes()


def test_factors_that_are_not_trained_keep_their_values(
    private_options: Callable[..., Any], play_rounds: Callable[..., Any], make_bundle: Any
) -> None:
    options = private_options(rounds=1)
    options |= {"aggregation": AggregationSection(factors="up")}
    played = {
        way: play_rounds("lora", **options, simulation=WAYS[way]) for way in ("onnx", "cohort")
    }
    first = make_bundle("lora", **private_options()).bundle.initial()
    for run in played.values():
        for name, value in run.tensors.items():
            unchanged = value.tobytes() == first[name].tobytes()
            assert unchanged == ("lora_A" in name), name
    for name, value in played["onnx"].tensors.items():
        np.testing.assert_allclose(played["cohort"].tensors[name], value, rtol=0, atol=1e-5)
