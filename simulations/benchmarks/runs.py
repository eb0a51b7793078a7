# SPDX-License-Identifier: Apache-2.0
"""What measurements share: a job played to its end, and figures that could not be measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from coordinator.bundles import recipe_of, split_spec, write_bundle
from coordinator.job import Job
from coordinator.journal import Journal
from coordinator.reports import RoundReport
from coordinator.sections import SimulationSection
from edge_runtime.bundle import Bundle, open_bundle
from protocol.signing import new_key, public_key_hex
from simulations.backends.play import Wrap, as_they_are, play
from simulations.benchmarks.figure import Figure, figure
from simulations.clients import make_clients
from simulations.datasets import Dataset
from simulations.errors import SimulationError
from simulations.setup import Setup
from tuning.compiler import compile_recipe
from tuning.errors import BackboneError

SIDE: Final = 28
CLASSES: Final = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a played job gave."""

    tensors: Mapping[str, np.ndarray]
    reports: tuple[RoundReport, ...]

    @property
    def accuracy(self) -> float:
        """Of the last round, on the test part."""
        value = self.reports[-1].accuracy
        if value is None:
            raise SimulationError("the last round was not tested; its test gave no finite accuracy")
        return value

    def steady_seconds(self) -> list[float]:
        """Training seconds of every round but the first, which warms up."""
        return [report.fit_seconds for report in self.reports[1:]]


def noise_dataset(samples: int, *, seed: int = 0) -> Dataset:
    """Images that hold nothing, where only time and memory are measured."""
    rng = np.random.default_rng(seed)

    def part(count: int) -> dict[str, np.ndarray]:
        images = rng.integers(0, 256, (count, SIDE, SIDE), dtype=np.uint8)
        return {"images": images, "labels": np.arange(count, dtype=np.int64) % CLASSES}

    return Dataset(
        name="noise",
        kind="image",
        train=part(samples),
        test=part(CLASSES),
        class_names=tuple(str(number) for number in range(CLASSES)),
    )


def set_up_with(job: Job, dataset: Dataset) -> Setup:
    """As `simulations.setup.set_up`, on a data set that is at hand."""
    data = job.data
    federation = make_clients(
        dataset,
        data.partition,
        data.clients,
        held_out=data.held_out,
        samples_per_client=data.samples_per_client,
        validation=data.validation,
        seed=job.job.seed,
    )
    recipe = recipe_of(job, len(dataset.class_names))
    return Setup(
        job=job,
        dataset=dataset,
        federation=federation,
        recipe=recipe,
        compiled=compile_recipe(recipe),
    )


def on(setup: Setup, backend: str, engine: str = "onnx", device: str = "cpu") -> Setup:
    """The same job on another backend or engine."""
    simulation = SimulationSection(backend=backend, engine=engine, device=device)
    return replace(setup, job=replace(setup.job, simulation=simulation))


def signed_bundle(setup: Setup, folder: Path) -> Bundle:
    """The job's bundle in `folder`/bundle, signed with a key that is then forgotten."""
    key = new_key()
    names = setup.dataset.class_names
    spec = split_spec(setup.job, setup.split) if setup.split else None
    made = write_bundle(
        setup.job, setup.recipe, setup.compiled, names, key, folder / "bundle", split=spec
    )
    return open_bundle(made, public_key=public_key_hex(key))


def run_job(setup: Setup, folder: Path, *, wrap: Wrap = as_they_are) -> Outcome:
    """All rounds of a job, in a fresh `folder`; `wrap` as in `play`."""
    folder.mkdir(parents=True)
    bundle = signed_bundle(setup, folder)
    reports: list[RoundReport] = []
    with Journal(folder / "journal.sqlite") as journal:
        result = play(setup, bundle, folder, journal, reports.append, wrap=wrap)
    return Outcome(tensors=result.tensors, reports=tuple(reports))


def pooled(setup: Setup) -> dict[str, np.ndarray]:
    """The raw training samples of all clients together, as a central trainer would hold them."""
    parts = [client.fit for client in setup.federation.clients]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Torch computes with `count` threads inside."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measured_if_possible(
    measure: Callable[[], Figure], name: str, *, unit: str = "", target: str = ""
) -> Figure:
    """A figure, or one without a value whose note says what is missing and how to get it.

    Only what a machine may lack is caught: data, a backbone's package, Ray.
    """
    try:
        return measure()
    except (SimulationError, BackboneError) as missing:
        return figure(name, math.nan, unit=unit, target=target, note=str(missing))


def labelled(figures: Sequence[Figure]) -> list[Figure]:
    """The same figures, said to be of a quick run."""
    return [replace(made, note=f"QUICK RUN; {made.note}".rstrip("; ")) for made in figures]
