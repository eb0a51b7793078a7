# SPDX-License-Identifier: Apache-2.0
"""FedIns beside one adapter for all: does it gain, and more where clients are mixed inside?

Fashion-MNIST's private half in five domains, labels dealt unevenly. Partitions of the same images:
every client has all domains, two of them, or one alone. FedIns claims that its gain grows with
what is mixed inside a client; the figures stand side by side here, so that it can be seen or
refuted. FedIns is there twice: merged as its authors do, and with our `counted-pool`.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Final

from coordinator.job import Job
from coordinator.sections import (
    AggregationSection,
    DataSection,
    JobSection,
    MethodSpec,
    RoundsSection,
    TrainingSection,
    UpdateSection,
)
from simulations.benchmarks.figure import Figure, figure
from simulations.benchmarks.runs import run_job
from simulations.progress import ProgressListener
from simulations.setup import set_up

MIXED: Final = "domains:mixed,dirichlet:0.2"
ALONE: Final = "domains:one-per-client,dirichlet:0.2"
OWN: Final = "fedins-counted"
"""What is held against the others: it was ahead of plain FedIns on `TUNING_SEED`."""


@dataclass(frozen=True, slots=True)
class Arm:
    """A method with the rate of `RATES` that suited it better than its neighbours there, in
    `TUNING_ROUNDS` rounds on `TUNING_SEED`, domains mixed; `tuned_rates` asks again."""

    method: MethodSpec
    learning_rate: float
    merger: str = "weighted-mean"


RATES: Final = (0.003, 0.01, 0.03, 0.1, 0.3)
TUNING_SEED: Final = 100
TUNING_ROUNDS: Final = 10
ARMS: Final[Mapping[str, Arm]] = {
    "fedins": Arm(MethodSpec(name="fedins"), 0.3),
    OWN: Arm(MethodSpec(name="fedins"), 0.03, "counted-pool"),
    "ssf": Arm(MethodSpec(name="ssf"), 0.01),
    "lora": Arm(MethodSpec(name="lora", settings={"rank": 8, "alpha": 16.0}), 0.01),
    "full": Arm(MethodSpec(name="full"), 0.01),
}


def fedins_job(
    arm: Arm, partition: str, seed: int, *, quick: bool = False, rounds: int = 15
) -> Job:
    """Plain sgd, the same images and rounds for every method."""
    return Job(
        job=JobSection(name="fedins-margin", seed=seed),
        data=DataSection(
            dataset="fashion-mnist",
            clients=10,
            partition=partition,
            held_out=0.0,
            max_train_samples=400 if quick else 2000,
            max_test_samples=400 if quick else 2000,
        ),
        method=arm.method,
        training=TrainingSection(optimizer="sgd", learning_rate=arm.learning_rate, batch_size=8),
        update=UpdateSection(metrics="loss,selected" if arm.method.name == "fedins" else "loss"),
        aggregation=AggregationSection(merger=arm.merger, weighting="uniform"),
        rounds=RoundsSection(count=1 if quick else rounds, evaluate_every=rounds),
    )


def fedins_margin(
    progress: ProgressListener,
    *,
    quick: bool = False,
    seeds: Sequence[int] = (0, 1, 2),
    arms: Mapping[str, Arm] = ARMS,
) -> Figure:
    """`fedins_margin`: points of test accuracy ahead of the best other method, domains mixed.

    Raises: DataError without Fashion-MNIST.
    """
    seeds = seeds[:1] if quick else seeds
    found = measured(progress, seeds=seeds, arms=arms, quick=quick)
    job = fedins_job(next(iter(arms.values())), MIXED, 0, quick=quick)
    return margin_figure(found, job, seeds=len(seeds))


def measured(
    progress: ProgressListener,
    *,
    seeds: Sequence[int],
    arms: Mapping[str, Arm] = ARMS,
    partitions: Sequence[str] = (MIXED, ALONE),
    quick: bool = False,
) -> dict[tuple[str, str], list[float]]:
    """Test accuracies, one a seed, of every partition and method; `quick` does the first alone."""
    found: dict[tuple[str, str], list[float]] = {}
    # Seed by seed and method by method, so that what is compiled once serves both partitions.
    for seed in seeds:
        for name, arm in arms.items():
            for partition in partitions[:1] if quick else partitions:
                reached = accuracy(fedins_job(arm, partition, seed, quick=quick), progress)
                found.setdefault((partition, name), []).append(reached)
    return found


def accuracy(job: Job, progress: ProgressListener) -> float:
    """Of one run, on the test part in all domains."""
    progress.stage(
        f"{job.method.name}, {job.aggregation.merger}, {job.data.partition}, "
        f"rate {job.training.learning_rate:g}, seed {job.job.seed}"
    )
    with tempfile.TemporaryDirectory() as folder:
        return run_job(set_up(job, progress), Path(folder) / "run").accuracy


def tuned_rates(progress: ProgressListener) -> dict[str, float]:
    """The rate of `RATES` with the best accuracy on `TUNING_SEED`, for every method."""
    best = {}
    for name, arm in ARMS.items():
        reached = {
            rate: accuracy(
                fedins_job(
                    replace(arm, learning_rate=rate), MIXED, TUNING_SEED, rounds=TUNING_ROUNDS
                ),
                progress,
            )
            for rate in RATES
        }
        best[name] = max(reached, key=lambda rate: reached[rate])
    return best


def margin_figure(
    found: Mapping[tuple[str, str], Sequence[float]], job: Job, *, seeds: int
) -> Figure:
    """The figure, from the accuracies of every partition, method and seed."""
    words = []
    margins = {}
    for partition in dict.fromkeys(partition for partition, _ in found):
        means = {
            name: mean(values) for (place, name), values in found.items() if place == partition
        }
        told = ", ".join(f"{name} {value:.4f}" for name, value in means.items())
        own = means.pop(OWN)
        others = [value for name, value in means.items() if name != "fedins"]
        margins[partition] = 100 * (own - max(others, default=math.nan))
        words.append(f"{partition}: {told} ({OWN} ahead {margins[partition]:+.2f} points)")
    data, rounds = job.data, job.rounds
    return figure(
        "fedins_margin",
        margins[MIXED],
        unit="points",
        target="> 0",
        note=f"{'; '.join(words)}; means of {seeds} seeds, {data.max_train_samples} training "
        f"images over {data.clients} clients, {rounds.count} rounds of one pass; the paper claims "
        "+6.64 on Tiny-ImageNet",
    )
