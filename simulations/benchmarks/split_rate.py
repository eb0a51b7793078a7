# SPDX-License-Identifier: Apache-2.0
"""How fast split training is: over a real stream under TLS, to a server in a process of its own."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Final

import numpy as np

from client_sdk.split_body import Exchange, RemoteBody
from edge_runtime import preprocess
from edge_runtime.split_trainer import SplitTrainer
from edge_runtime.trainer import initial_state
from edge_runtime.training_loop import TrainingLoop, batch_of
from protocol.split import largest_message
from simulations.backends.split import local_exchange
from simulations.benchmarks.device_step import save_vit_base
from simulations.benchmarks.figure import Figure, figure
from simulations.benchmarks.runs import torch_threads
from simulations.benchmarks.split_exact import split_job
from simulations.benchmarks.split_serving import ROWS, THREADS, Made, made, serving
from simulations.progress import ProgressListener
from simulations.setup import load_job_data
from tuning.compiler import compile_recipe
from tuning.split_body import TorchBody


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model, and how it steps: `steps` in a row, `repetitions` times."""

    name: str
    batch: int
    steps: int
    repetitions: int
    cut: str = "faithful-minimal"


SMALL: Final = Case(name="small ViT", batch=32, steps=10, repetitions=7)
BASE: Final = Case(name="ViT-B/16", batch=4, steps=2, repetitions=3)


def split_rate_ratio(
    progress: ProgressListener,
    *,
    small: Case = SMALL,
    base: Case | None = BASE,
    backbone: Path | None = None,
    engines: Sequence[str] = ("torch", "onnx"),
    lanes: Sequence[int] = (1, 2),
) -> Figure:
    """`split_rate_ratio`: steps a second through the stream, of those of the whole network's own
    graph in one process; one client, in turns, two threads each side.

    ViT-B/16 decides. The small ViT, or without `base` alone, is told beside it: its step is so
    short that waking threads and processes is a good part of it.
    """
    words = [f"TLS on loopback, cut {small.cut}"]
    rates = measured(progress, small, backbone, engines, lanes)
    words.append(_words(small, rates))
    if base is not None:
        with tempfile.TemporaryDirectory() as folder:
            model = save_vit_base(Path(folder) / "vit-base")
            # Of the large model nothing should stay behind in the user's cache.
            cache = Path(folder) / "cache"
            rates = measured(progress, base, model, engines, lanes, cache)
        words.insert(1, _words(base, rates))
    return figure(
        "split_rate_ratio",
        max(rates.ratio(way) for way in rates.split),
        target=">= 0.85",
        note="; ".join(words),
    )


def split_lanes_ratio(
    progress: ProgressListener,
    *,
    case: Case = SMALL,
    backbone: Path | None = None,
    megabits: float = 100.0,
) -> Figure:
    """`split_lanes_ratio`: steps a second on two lanes, of those on one, over an emulated link.

    What is sent waits its turn and as long as the link would take for it, each way by itself; the
    body is torch's, in this process.
    """
    progress.stage("split: lanes over a slow link")
    samples = case.batch * case.steps
    job = split_job(backbone, batch=case.batch, cut=case.cut, samples=samples, clients=1)
    taken: dict[int, list[float]] = {1: [], 2: []}
    with torch_threads(1), made(job) as split:
        engine, at_work = TorchBody(split.recipe.build()[1]), threading.Lock()
        link = _Link(megabits)
        ways = {}
        for count in taken:
            bodies = [
                RemoteBody(
                    split.spec,
                    link.around(local_exchange(engine, split.spec, ROWS, at_work)),
                    max_bytes=largest_message(split.spec, ROWS),
                )
                for _ in range(count)
            ]
            trainer = SplitTrainer(split.bundle, *bodies, threads=1)
            ways[count] = _split(trainer, _data(split, case), case)
        for number in range(case.repetitions + 1):
            for count, run in ways.items():
                began = time.perf_counter()
                run()
                if number:
                    taken[count].append(time.perf_counter() - began)
    pairs = zip(taken[1], taken[2], strict=True)
    return figure(
        "split_lanes_ratio",
        median(one / two for one, two in pairs),
        note=f"{case.name}, cut {case.cut}, batch {case.batch}, {megabits:g} Mbit/s each way: "
        f"{case.steps / median(taken[1]):.1f} steps/s on one lane",
    )


class _Link:
    """Two ways of so many megabits a second, which messages share."""

    def __init__(self, megabits: float) -> None:
        self._seconds = 8 / (megabits * 1e6)  # a byte
        self._up, self._down = threading.Lock(), threading.Lock()

    def around(self, exchange: Exchange) -> Exchange:
        def delayed(blob: bytes) -> bytes:
            with self._up:
                time.sleep(self._seconds * len(blob))
            answer = exchange(blob)
            with self._down:
                time.sleep(self._seconds * len(answer))
            return answer

        return delayed


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds of the same steps, in turns."""

    steps: int
    unsplit: Sequence[float]
    split: dict[str, Sequence[float]]

    def ratio(self, way: str) -> float:
        """Steps a second of a way to split them, of those unsplit."""
        pairs = zip(self.unsplit, self.split[way], strict=True)
        return median(whole_s / split_s for whole_s, split_s in pairs)


def measured(
    progress: ProgressListener,
    case: Case,
    backbone: Path | None,
    engines: Sequence[str],
    lanes: Sequence[int],
    cache: Path | None = None,
) -> Rates:
    """Every engine with every number of lanes, beside the whole network."""
    progress.stage(f"split: compiling the {case.name}")
    samples = case.batch * case.steps
    job = split_job(backbone, batch=case.batch, cut=case.cut, samples=samples, clients=1)
    taken: dict[str, list[float]] = {}
    ways: dict[str, Callable[[], None]] = {}
    with ExitStack() as stack:
        for count in lanes:
            section = replace(job.split, lanes=count)
            split = stack.enter_context(made(replace(job, split=section), cache))
            if not ways:
                ways["unsplit"] = _unsplit(split, case, cache)
            for engine in engines:
                served = stack.enter_context(serving(split, engine=engine))
                bodies = [
                    stack.enter_context(served.body(split.spec, "device", lane))
                    for lane in range(count)
                ]
                trainer = SplitTrainer(split.bundle, *bodies, threads=THREADS)
                name = f"{engine} body, {count} {'lane' if count == 1 else 'lanes'}"
                ways[name] = _split(trainer, _data(split, case), case)
        for number in range(case.repetitions + 1):
            progress.stage(f"split: rate of the {case.name} {number}/{case.repetitions}")
            for way, run in ways.items():
                began = time.perf_counter()
                run()
                if number:
                    taken.setdefault(way, []).append(time.perf_counter() - began)
    return Rates(case.steps, taken.pop("unsplit"), dict(taken))


def _data(split: Made, case: Case) -> dict[str, np.ndarray]:
    train = load_job_data(split.job).train
    few = {name: values[: case.batch * case.steps] for name, values in train.items()}
    return preprocess(split.bundle.manifest.preprocessing, few)


def _unsplit(split: Made, case: Case, cache: Path | None) -> Callable[[], None]:
    manifest = split.bundle.manifest
    loop = TrainingLoop(compile_recipe(split.recipe, cache).folder / "train.onnx", threads=THREADS)
    names = [name for name, _ in manifest.inputs]
    data, start = _data(split, case), split.bundle.initial()
    weight = np.ones(case.batch, np.float32)

    def run() -> None:
        rows = np.arange(case.batch * case.steps).reshape(case.steps, case.batch)
        batches = ({**batch_of(data, names, each), "weight": weight} for each in rows)
        loop.run(start, initial_state(manifest, start), batches, 1e-3)

    return run


def _split(trainer: SplitTrainer, data: dict[str, np.ndarray], case: Case) -> Callable[[], None]:
    start = trainer.bundle.initial()

    def run() -> None:
        trainer.fit(start, data, learning_rate=1e-3, epochs=1, seed=0, most_steps=case.steps)

    return run


def _words(case: Case, rates: Rates) -> str:
    ratios = ", ".join(f"{way} {rates.ratio(way):.2f}" for way in rates.split)
    rate = rates.steps / median(rates.unsplit)
    return f"{case.name}, batch {case.batch}: {ratios} of {rate:.2f} steps/s unsplit"
