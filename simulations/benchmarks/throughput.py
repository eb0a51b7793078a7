# SPDX-License-Identifier: Apache-2.0
"""Simulated samples a second, beside the other ways to train on them.

Every way trains the same LoRA tensors of the shipped backbone with AdamW on the same noise images.
What is timed is a round's training, from the plans to the last merged update, in rounds after the
first; a ratio is the median over repetitions that take turns, so that a machine that slows down
slows all of them.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Final

from coordinator.job import Job
from coordinator.sections import (
    BackboneSection,
    DataSection,
    JobSection,
    MethodSpec,
    RoundsSection,
    TrainingSection,
)
from edge_runtime import batch_plan, preprocess
from protocol.files import INITIAL_FILE
from simulations.benchmarks.figure import Figure, figure
from simulations.benchmarks.runs import noise_dataset, on, pooled, run_job, set_up_with
from simulations.errors import SimulationError
from simulations.progress import ProgressListener
from simulations.setup import Setup

# Seconds that one pass over all samples took, several times.
Runner = Callable[[], Sequence[float]]

NAMES: Final = ("cohort_vs_sequential", "cohort_vs_central", "cohort_vs_flower")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much is trained; `rounds` counts the one that warms up."""

    clients: int = 100
    images: int = 40
    rounds: int = 4
    repetitions: int = 3
    central_batch: int = 256
    flower_repetitions: int = 1
    backbone: str = ""
    """A folder; empty for the shipped one."""


QUICK: Final = Scale(rounds=2, repetitions=1)


def throughput_setup(scale: Scale) -> Setup:
    """Equal clients of noise images, LoRA r=4, batch 8, one epoch a round, nothing held out."""
    backbone = BackboneSection()
    if scale.backbone:
        backbone = BackboneSection(name="", path=scale.backbone)
    job = Job(
        job=JobSection(name="throughput"),
        backbone=backbone,
        data=DataSection(clients=scale.clients, partition="iid", held_out=0.0),
        method=MethodSpec(name="lora", settings={"rank": 4, "alpha": 8.0}),
        training=TrainingSection(optimizer="adamw", learning_rate=1e-3, batch_size=8),
        rounds=RoundsSection(count=scale.rounds, evaluate_every=scale.rounds),
    )
    return set_up_with(job, noise_dataset(scale.clients * scale.images))


def throughput(progress: ProgressListener, scale: Scale) -> list[Figure]:
    """`cohort_vs_sequential` and `cohort_vs_central`; with a GPU the former on it as well."""
    progress.stage("throughput: compiling")
    setup = throughput_setup(scale)
    samples = scale.clients * scale.images
    with tempfile.TemporaryDirectory() as folder:
        work = _Work(Path(folder))
        runners: dict[str, Runner] = {
            "cohort": partial(work.rounds, on(setup, "cohort")),
            "sequential": partial(work.rounds, on(setup, "sequential", "torch")),
            "central": partial(central_seconds, setup, scale.central_batch, scale.rounds - 1),
        }
        if _has_gpu():
            cohort = on(setup, "cohort", "torch", "cuda")
            sequential = on(setup, "sequential", "torch", "cuda")
            runners["GPU cohort"] = partial(work.rounds, cohort)
            runners["GPU sequential"] = partial(work.rounds, sequential)
        taken = take_turns(runners, scale.repetitions, progress)
    rates = {name: samples / median(seconds) for name, seconds in taken.items()}
    cohort_rate = f"cohort {rates['cohort']:.0f} samples/s"
    figures = [
        figure(
            "cohort_vs_sequential",
            ratio(taken["sequential"], taken["cohort"]),
            target=">= 2.3",
            note=f"{cohort_rate}, torch clients in turn {rates['sequential']:.0f}",
        ),
        figure(
            "cohort_vs_central",
            ratio(taken["central"], taken["cohort"]),
            target=">= 1.05",
            note=f"{cohort_rate}, central at batch {scale.central_batch} {rates['central']:.0f}",
        ),
    ]
    if "GPU cohort" in taken:
        figures.append(
            figure(
                "gpu_cohort_vs_sequential",
                ratio(taken["GPU sequential"], taken["GPU cohort"]),
                target=">= 10",
                note=f"cohort {rates['GPU cohort']:.0f} samples/s, torch clients in turn "
                f"{rates['GPU sequential']:.0f}, both on the GPU",
            )
        )
    return figures


def cohort_vs_flower(progress: ProgressListener, scale: Scale) -> Figure:
    """The ray backend with torch clients, one and two cores a worker, the faster one counted.

    Raises: SimulationError without Ray.
    """
    from simulations.backends.ray import onnx_engine
    from simulations.benchmarks.flower import TorchEngine, run_on_flower

    setup = throughput_setup(scale)
    samples = scale.clients * scale.images
    with tempfile.TemporaryDirectory() as folder:
        work = _Work(Path(folder))

        def flower(engine: Callable[[str], object], cpus: int) -> list[float]:
            place = work.fresh()
            return run_on_flower(setup, place, engine, cpus_per_client=cpus).steady_seconds()

        cohort = partial(work.rounds, on(setup, "cohort"))
        taken = take_turns(
            {
                "cohort": cohort,
                "torch, 1 core a worker": partial(flower, TorchEngine(1), 1),
                "torch, 2 cores a worker": partial(flower, TorchEngine(2), 2),
                "our engine, 1 core a worker": partial(flower, onnx_engine, 1),
                "cohort again": cohort,
            },
            scale.flower_repetitions,
            progress,
        )
    both = list(map(_mean, taken.pop("cohort"), taken.pop("cohort again")))
    ours = taken["our engine, 1 core a worker"]
    best = min((name for name in taken if name.startswith("torch")), key=lambda n: median(taken[n]))
    rates = ", ".join(f"{name}: {samples / median(times):.0f}" for name, times in taken.items())
    return figure(
        "cohort_vs_flower",
        ratio(taken[best], both),
        target=">= 2.2",
        note=f"cohort {samples / median(both):.0f} samples/s; Ray with {rates}; against Ray with "
        f"our engine {ratio(ours, both):.2f}",
    )


def central_seconds(setup: Setup, batch_size: int, passes: int) -> list[float]:
    """Seconds of each pass of plain torch training over the clients' pooled samples."""
    from safetensors.numpy import load_file

    from tuning.torch_trainer import TorchTrainer

    _, tuned = setup.recipe.build()
    spec = replace(setup.recipe.training, batch_size=batch_size)
    trainer = TorchTrainer(tuned, spec, batch_plan=batch_plan)
    data = preprocess(setup.compiled.preprocessing, pooled(setup))
    tensors = load_file(setup.compiled.folder / INITIAL_FILE)
    few = {name: value[:batch_size] for name, value in data.items()}
    trainer.fit(tensors, few, learning_rate=1e-3, epochs=2, seed=0)
    seconds = []
    for number in range(max(passes, 1)):
        started = time.perf_counter()
        trainer.fit(tensors, data, learning_rate=1e-3, epochs=1, seed=number)
        seconds.append(time.perf_counter() - started)
    return seconds


def take_turns(
    runners: dict[str, Runner], repetitions: int, progress: ProgressListener
) -> dict[str, list[float]]:
    """Run each in turn, `repetitions` times over; the median seconds of every repetition."""
    taken: dict[str, list[float]] = {name: [] for name in runners}
    for number in range(1, repetitions + 1):
        for name, runner in runners.items():
            progress.stage(f"throughput {number}/{repetitions}: {name}")
            taken[name].append(median(runner()))
    return taken


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """The median over repetitions of how many times longer the first took."""
    return median(a / b for a, b in zip(slow, fast, strict=True))


def _mean(first: float, second: float) -> float:
    return math.fsum((first, second)) / 2


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


class _Work:
    """Fresh folders below one that is removed at the end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    def fresh(self) -> Path:
        """A folder that does not exist yet."""
        self._count += 1
        return self._folder / str(self._count)

    def rounds(self, setup: Setup) -> list[float]:
        """Seconds of the steady rounds of a job."""
        outcome = run_job(setup, self.fresh())
        rejected = sum(len(report.rejections) for report in outcome.reports)
        if rejected:
            raise SimulationError(f"{rejected} updates were rejected; a figure needs all of them")
        return outcome.steady_seconds()
