# SPDX-License-Identifier: Apache-2.0
"""Each measurement on a tiny setting: figures with the promised names, and values that can be."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.job import Job, dump_job
from coordinator.sections import MethodSpec, RoundsSection
from simulations.benchmarks import (
    accuracy,
    aggregation,
    command,
    device,
    device_step,
    fedins,
    instance,
    instance_latency,
    parity,
    simulation,
    split,
    throughput,
    wire,
)
from simulations.benchmarks.device_idle import device_idle_mb
from simulations.benchmarks.device_round import Work, device_round_seconds
from simulations.benchmarks.device_start import device_start
from simulations.benchmarks.device_step import SMALL, device_step_ratio
from simulations.benchmarks.figure import Figure, figure
from simulations.benchmarks.flower import TorchEngine
from simulations.benchmarks.memory import cohort_memory_mb
from simulations.benchmarks.processes import run_command
from simulations.benchmarks.runs import labelled, measured_if_possible, run_job
from simulations.errors import DataError, SimulationError
from simulations.progress import SilentProgress

QUIET = SilentProgress()
MakeJob = Callable[..., Job]
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs fedloom[ray]")


@pytest.fixture
def tiny(tiny_vit: Path) -> throughput.Scale:
    return throughput.Scale(
        clients=3, images=6, rounds=2, repetitions=1, central_batch=4, backbone=str(tiny_vit)
    )


def two_rounds(job: Job) -> Job:
    return replace(job, rounds=RoundsSection(count=2, evaluate_every=2))


# Parity


@pytest.mark.long
def test_onnx_parity_names_the_method_that_is_farthest_off(tiny_vit: Path) -> None:
    made = parity.onnx_parity(
        QUIET,
        methods={"head": {}, "lora": {"rank": 2}},
        trainings={"AdamW": parity.TRAININGS["AdamW"]},
        backbone=tiny_vit,
    )
    assert made.name == "onnx_parity" and made.holds
    assert 0 < made.value < 1e-5
    assert re.search(r"(head|lora) with AdamW", made.note)


def test_parity_figure_names_what_torch_itself_cannot_decide() -> None:
    made = parity.parity_figure(
        [
            parity.Compared("lora with SGD", distance=2e-7, spread=1e-7),
            parity.Compared("full with AdamW", distance=3.5e-3, spread=3.3e-3),
        ]
    )
    assert made.value == 2e-7 and made.holds
    assert made.note.startswith("1 of 2 pairs")
    assert "not decidable: full with AdamW, 3.5e-03 where torch differs from itself by 3.3e-03" in (
        made.note
    )


@pytest.mark.parametrize(
    ("distance", "spread"),
    [
        pytest.param(2e-5, 1e-7, id="torch agrees with itself"),
        pytest.param(2e-3, 9e-6, id="torch agrees with itself to the target"),
        pytest.param(9e-3, 3.3e-3, id="the graph is much farther off"),
    ],
)
def test_parity_figure_fails_when_the_graph_is_off(distance: float, spread: float) -> None:
    made = parity.parity_figure([parity.Compared("lora with SGD", distance, spread)])
    assert made.value == distance and made.holds is False


def test_cohort_parity_holds_when_runs_agree(tiny_job: MakeJob) -> None:
    made = parity.cohort_parity(QUIET, two_rounds(tiny_job("lora")))
    assert made.name == "cohort_parity" and made.holds
    assert "equal byte for byte" in made.note


def test_cohort_parity_fails_when_two_runs_of_a_backend_differ(
    tiny_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = iter(range(4))

    def uneven(setup: Any, folder: Path) -> Any:
        value = np.array([1e-9 * next(runs)], np.float32)
        return type("Outcome", (), {"tensors": {"w": value}})

    monkeypatch.setattr(parity, "run_job", uneven)
    made = parity.cohort_parity(QUIET, two_rounds(tiny_job("lora")))
    assert made.value < 1e-5 and made.holds is False
    assert "two runs of cohort and of sequential differ" in made.note


def test_largest_difference_is_refused_when_names_differ() -> None:
    with pytest.raises(ValueError, match="'b'"):
        parity.largest_difference({"a": np.zeros(1)}, {"a": np.zeros(1), "b": np.zeros(1)})


# Throughput and memory


@pytest.mark.long
def test_throughput_gives_both_ratios(tiny: throughput.Scale) -> None:
    sequential, central, *_ = throughput.throughput(QUIET, tiny)
    assert (sequential.name, central.name) == ("cohort_vs_sequential", "cohort_vs_central")
    assert sequential.value > 0 and central.value > 0
    assert "samples/s" in sequential.note and "batch 4" in central.note


def test_ratio_is_the_median_of_pairs_that_ran_side_by_side() -> None:
    assert throughput.ratio([2.0, 40.0, 3.0], [1.0, 20.0, 1.0]) == 2.0


def test_torch_engines_are_one_cache_entry_when_equal() -> None:
    assert TorchEngine(1) == TorchEngine(1) and hash(TorchEngine(1)) == hash(TorchEngine(1))
    assert TorchEngine(1) != TorchEngine(2)


@needs_ray
@pytest.mark.ray
@pytest.mark.long
@pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_cohort_vs_flower_takes_the_best_of_flowers_settings(tiny: throughput.Scale) -> None:
    made = throughput.cohort_vs_flower(QUIET, tiny)
    assert made.name == "cohort_vs_flower" and made.value > 0
    assert "torch, 1 core a worker" in made.note and "torch, 2 cores a worker" in made.note


@needs_ray
@pytest.mark.ray
@pytest.mark.long
def test_cohort_memory_is_held_against_a_third_of_rays(tiny: throughput.Scale) -> None:
    made = cohort_memory_mb(QUIET, tiny)
    assert made.name == "cohort_memory_mb" and made.unit == "MB"
    assert 50 < made.value < 5000
    rays = float(re.search(r"torch clients (\d+) MB", made.note)[1])  # type: ignore[index]
    assert float(made.target.removeprefix("<= ")) == pytest.approx(rays / 3, abs=1)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_children_is_counted() -> None:
    child = "x = bytearray(60 * 2**20); import time; time.sleep(0.5)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    ran = run_command([sys.executable, "-c", code], watch_memory=True)
    assert 60 < ran.peak_mb < 150
    assert ran.processes == 2 and ran.seconds > 0.5


def test_command_that_fails_is_an_error_with_its_words() -> None:
    with pytest.raises(SimulationError, match=r"ended with 1.*out of paper"):
        run_command([sys.executable, "-c", "raise SystemExit('out of paper')"])


# Accuracy


def test_central_gap_is_central_less_federated_in_points(tiny_job: MakeJob) -> None:
    made = accuracy.central_gap(QUIET, two_rounds(tiny_job("lora")))
    federated, central = (
        float(value) for value in re.findall(r"(?:federated|central) ([01]\.\d+)", made.note)
    )
    assert made.name == "central_gap" and made.holds is None
    assert made.value == pytest.approx(100 * (central - federated), abs=0.02)


@pytest.mark.long
def test_text_central_gap_has_a_bag_of_words_beside_it(tiny_job: MakeJob) -> None:
    made = accuracy.text_central_gap(QUIET, two_rounds(tiny_job("lora", kind="text")))
    assert made.name == "text_central_gap" and made.target == "<= 5"
    # Every text of this data set has a word that tells its class.
    assert made.note.endswith("TF-IDF with logistic regression 1.0000")


def test_shipped_jobs_are_those_of_the_table() -> None:
    images, texts = accuracy.image_job(), accuracy.text_job()
    assert (images.data.dataset, images.data.clients, images.rounds.count) == (
        "fashion-mnist", 100, 20
    )  # fmt: skip
    assert (texts.data.dataset, texts.data.clients) == ("debian-descriptions", 50)
    assert texts.method == MethodSpec(name="lora", settings={"rank": 8, "alpha": 16.0})


# Wire


def test_one_bit_size_counts_whole_containers() -> None:
    made = wire.one_bit_size_ratio()
    assert made.name == "one_bit_size_ratio"
    assert 1 / 32 < made.value <= 1 / 28 and made.holds


@pytest.mark.long
def test_one_bit_accuracy_gap_compares_codecs_over_seeds(
    tiny_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    codecs = {name: wire.KINDS[name] for name in ("float32", "one-bit")}
    monkeypatch.setattr(wire, "KINDS", codecs)
    made = wire.one_bit_accuracy_gap(QUIET, two_rounds(tiny_job("adapter")), seeds=range(1))
    assert made.name == "one_bit_accuracy_gap" and abs(made.value) <= 100
    assert all(f"{kind} 0." in made.note for kind in wire.KINDS)


# Device


@pytest.mark.long
def test_device_start_gives_both_ratios(tiny_vit: Path) -> None:
    start, memory = device_start(QUIET, repetitions=1, backbone=tiny_vit)
    assert (start.name, memory.name) == ("device_start_ratio", "device_memory_ratio")
    assert 0 < start.value < 1 and 0 < memory.value < 1


def test_a_devices_part_of_a_round_is_answered_and_kept(tiny_vit: Path) -> None:
    """A device that answers another plan, or keeps no update, makes the measurement raise."""
    work = Work(batch=4, steps=2, side=8, backbone=tiny_vit)
    made = device_round_seconds(QUIET, repetitions=1, work=work)
    assert (made.name, made.unit, made.target) == ("device_round_seconds", "s", "<= 2")
    assert made.value > 0.2, "a Python that loads Flower takes longer than that"
    assert made.note.startswith("2 steps of 4 images")


@pytest.mark.slow
def test_an_idle_device_keeps_little_memory(cache_of_the_session: Path) -> None:
    made = device_idle_mb(QUIET, samples=1)
    assert made.name == "device_idle_mb" and made.holds, made
    assert made.value > 5, "an interpreter takes more than that"
    assert re.search(r"\d+ \+ \d+ MiB; \d+ MiB in all$", made.note), made.note


@pytest.mark.long
def test_device_step_gives_the_worst_ratio(tiny_vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A ViT-B/16 takes a minute to compile; that there is a second network is what matters here.
    monkeypatch.setattr(device_step, "save_vit_base", lambda folder: tiny_vit)
    few = replace(SMALL, steps=2, repetitions=1)
    made = device_step_ratio(QUIET, small=few, base=replace(few, name="other"), backbone=tiny_vit)
    assert made.name == "device_step_ratio"
    ratios = [float(value) for value in re.findall(r"= ([\d.]+)", made.note)]
    assert made.value == pytest.approx(max(ratios), abs=0.01)


# The same properties hold the method itself in tests/tuning/test_fedins.py and test_ssf.py.
@pytest.mark.long
def test_what_is_exact_of_instance_pools_holds(tiny_vit: Path) -> None:
    same = instance.batch_invariance(QUIET, backbone=tiny_vit)
    assert same.name == "batch_invariance" and same.holds and same.value > 0
    one = instance.pool_of_one(QUIET, backbone=tiny_vit)
    assert one.name == "pool_of_one" and one.holds
    assert float(re.search(r"by up to ([\d.e-]+)", one.note)[1]) > 1e-3  # type: ignore[index]
    folded = instance.folded_ssf(QUIET, backbone=tiny_vit)
    assert folded.name == "folded_ssf" and folded.holds
    nodes = re.search(r"^(\d+) nodes, the backbone alone has (\d+)", folded.note)
    assert nodes is not None and nodes[1] == nodes[2]


@pytest.mark.long
def test_folded_ssf_fails_when_the_graph_is_larger(
    tiny_vit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter((90, 80))
    monkeypatch.setattr(instance, "_nodes", lambda path: next(counts))
    made = instance.folded_ssf(QUIET, backbone=tiny_vit)
    assert made.value < 1e-4 and made.holds is False


def test_parameters_are_those_of_the_papers() -> None:
    ssf, pool = instance.parameters(QUIET)
    assert (ssf.name, ssf.value, ssf.holds) == ("ssf_parameters", 205_824, True)
    assert (pool.name, pool.value, pool.holds) == ("pool_parameters", 7_087_300, True)
    assert "282,724 with one of 100 classes" in ssf.note
    assert "9,009,800 with 200" in pool.note and "8.3% and 10.5%" in pool.note


@pytest.mark.long
def test_latency_is_that_of_both_branches(tiny_vit: Path) -> None:
    made = instance_latency.instance_latency_ratio(
        QUIET, repetitions=1, images=3, backbone=tiny_vit, base=False
    )
    assert made.name == "instance_latency_ratio" and made.value > 0
    assert "with the query branch" in made.note and "with known features" in made.note


def test_latency_holds_only_where_both_ratios_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for known, holds in ((1.1, True), (1.2, False)):
        timing = instance_latency.Timing(plain_s=1.0, with_query=2.0, known_query=known)
        monkeypatch.setattr(instance_latency, "latency", lambda *_, timing=timing: timing)
        made = instance_latency.instance_latency_ratio(QUIET, base=False)
        assert made.value == 2.0 and made.holds is holds


def test_adapter_switch_is_beside_loading(tiny_vit: Path) -> None:
    made = instance_latency.adapter_switch_ratio(QUIET, repetitions=1, backbone=tiny_vit)
    assert made.name == "adapter_switch_ratio" and 0 < made.value < 1


# The commands


def test_help_seconds_is_the_difference() -> None:
    made = command.help_seconds(QUIET, repetitions=1)
    assert made.name == "help_seconds" and 0 < made.value < 30


@pytest.mark.long
def test_demo_accuracy_is_read_from_a_process_of_its_own(
    tiny_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tmp_path / "job.toml"
    job.write_text(dump_job(two_rounds(tiny_job("head"))))
    made = command.demo_accuracy(QUIET, job=job)
    assert made.name == "demo_accuracy" and 0 <= made.value <= 1
    monkeypatch.setattr(command, "DEMO_SECONDS", 0.0)
    monkeypatch.setattr(command, "run_command", _demo_stand_in)
    late = command.demo_accuracy(QUIET, job=job)
    assert late.value == 0.99 and late.holds is False


def _demo_stand_in(arguments: list[str], environment: dict[str, str]) -> Any:
    out = Path(arguments[-1])
    out.mkdir()
    (out / "summary.json").write_text(json.dumps({"accuracy": 0.99}))
    return type("Ran", (), {"seconds": 1.0})


def test_demo_says_what_is_missing_outside_a_checkout(tmp_path: Path) -> None:
    with pytest.raises(SimulationError, match="in a checkout"):
        command.demo_accuracy(QUIET, job=tmp_path / "absent.toml")


# All together


def test_figure_has_no_value_but_the_mend_when_data_are_missing() -> None:
    def missing() -> Figure:
        raise DataError("fashion-mnist: apt-get install dataset-fashion-mnist")

    made = measured_if_possible(missing, "central_gap", unit="points")
    assert math.isnan(made.value) and made.holds is None
    assert "apt-get install" in made.note


def test_unforeseen_fault_is_not_taken_for_missing_data() -> None:
    with pytest.raises(ZeroDivisionError):
        measured_if_possible(lambda: figure("x", 1 / 0), "x")


def test_quick_figures_say_so() -> None:
    (made,) = labelled([figure("x", 1.0)])
    assert made.note == "QUICK RUN"


def test_fedins_margin_is_over_the_best_other_method_where_domains_are_mixed() -> None:
    found = {
        (fedins.MIXED, fedins.OWN): [0.80, 0.84],
        (fedins.MIXED, "fedins"): [0.85, 0.85],
        (fedins.MIXED, "ssf"): [0.81, 0.79],
        (fedins.MIXED, "lora"): [0.70, 0.72],
        (fedins.ALONE, fedins.OWN): [0.70, 0.70],
        (fedins.ALONE, "fedins"): [0.60, 0.60],
        (fedins.ALONE, "ssf"): [0.75, 0.75],
        (fedins.ALONE, "lora"): [0.60, 0.60],
    }
    job = fedins.fedins_job(fedins.ARMS["fedins"], fedins.MIXED, 0)
    made = fedins.margin_figure(found, job, seeds=2)
    assert made.value == pytest.approx(2.0) and made.holds
    assert "counted ahead +2.00 points)" in made.note and "counted ahead -5.00 points)" in made.note
    worse = {**found, (fedins.MIXED, "lora"): [0.9, 0.9]}
    assert fedins.margin_figure(worse, job, seeds=2).holds is False


def test_all_methods_of_the_margin_have_the_same_data_and_rounds() -> None:
    jobs = [fedins.fedins_job(arm, fedins.MIXED, 3) for arm in fedins.ARMS.values()]
    weightings = {job.aggregation.weighting for job in jobs}
    assert len({(job.data, job.rounds, job.backbone) for job in jobs}) == len(weightings) == 1
    assert {job.method.name for job in jobs} == {"fedins", "ssf", "lora", "full"}


@pytest.mark.parametrize("quick", [False, True])
def test_every_figure_of_the_table_is_measured(
    quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def named(*names: str) -> Callable[..., Any]:
        made = [figure(name, 1.0) for name in names]
        return lambda *_, **__: made if len(made) > 1 else made[0]

    for name in (
        "onnx_parity", "cohort_parity", "cohort_vs_flower", "cohort_memory_mb", "demo_accuracy",
        "help_seconds", "text_central_gap", "central_gap", "fedins_margin",
    ):  # fmt: skip
        monkeypatch.setattr(simulation, name, named(name))
    both = named("cohort_vs_sequential", "cohort_vs_central")
    monkeypatch.setattr(simulation, "throughput", both)
    for name in ("one_bit_accuracy_gap", "ternary_entropy_ratio", "codec_vs_zlib"):
        monkeypatch.setattr(wire, name, named(name))
    both = named("update_bytes_ratio", "bytes_to_accuracy_ratio")
    monkeypatch.setattr(wire, "bytes_ratios", both)
    for name in ("exact_merge_error", "merge_vs_copy", "attack_worst_accuracy"):
        monkeypatch.setattr(aggregation, name, named(name))
    both = named("device_start_ratio", "device_memory_ratio")
    monkeypatch.setattr(device, "device_start", both)
    for name in (
        "device_idle_mb", "device_round_seconds", "device_step_ratio", "batch_invariance",
        "pool_of_one", "folded_ssf", "instance_latency_ratio", "adapter_switch_ratio",
    ):  # fmt: skip
        monkeypatch.setattr(device, name, named(name))
    for name in (
        "split_parity", "plain_split_parity", "device_flops_share", "accuracy_gap",
        "split_rate_ratio", "split_lanes_ratio", "split_batching_ratio", "slow_loris_p99_ms",
        "half_open_p99_ms", "reconstruction_psnr_db",
    ):  # fmt: skip
        monkeypatch.setattr(split, name, named(name))
    shares = iter(["traffic_share", "traffic_share_pooled"] * 2)
    monkeypatch.setattr(split, "traffic_share", lambda **_: figure(next(shares), 1.0))
    both = named("ssf_parameters", "pool_parameters")
    monkeypatch.setattr(device, "parameters", both)
    found = [
        made
        for bench in (simulation, wire, device, aggregation, split)
        for made in bench.figures(QUIET, quick=quick)
    ]
    assert [made.name for made in found] == [
        "onnx_parity", "cohort_parity", "cohort_vs_sequential", "cohort_vs_central",
        "cohort_vs_flower", "cohort_memory_mb", "demo_accuracy", "help_seconds",
        "text_central_gap", "central_gap", "fedins_margin",
        "one_bit_size_ratio", "one_bit_accuracy_gap",
        "ternary_entropy_ratio", "codec_vs_zlib", "update_bytes_ratio", "bytes_to_accuracy_ratio",
        "device_start_ratio", "device_memory_ratio", "device_idle_mb",
        "device_round_seconds", "device_step_ratio", "batch_invariance",
        "pool_of_one", "folded_ssf", "ssf_parameters", "pool_parameters",
        "instance_latency_ratio", "adapter_switch_ratio",
        "exact_merge_error", "merge_vs_copy", "attack_worst_accuracy",
        "split_parity", "plain_split_parity", "device_flops_share", "traffic_share",
        "traffic_share_pooled", "accuracy_gap", "split_rate_ratio", "split_lanes_ratio",
        "split_batching_ratio", "slow_loris_p99_ms", "half_open_p99_ms",
        "reconstruction_psnr_db",
    ]  # fmt: skip
    assert all(made.note.startswith("QUICK") for made in found) is quick


def test_run_job_leaves_reports_of_all_rounds(make_setup: Callable[..., Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        outcome = run_job(make_setup("head"), Path(folder) / "run")
    assert len(outcome.steady_seconds()) == len(outcome.reports) - 1
    assert 0 <= outcome.accuracy <= 1
