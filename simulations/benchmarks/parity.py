# SPDX-License-Identifier: Apache-2.0
"""Whether every way to train gives the same tensors: graphs, torch, cohorts, clients in turn."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from coordinator.job import Job
from coordinator.sections import (
    DataSection,
    JobSection,
    MethodSpec,
    RoundsSection,
    TrainingSection,
)
from edge_runtime import preprocess
from edge_runtime.training_loop import TrainingLoop
from protocol.files import INITIAL_FILE
from protocol.manifest import TrainingSpec
from protocol.tensors import Tensors
from simulations.benchmarks.figure import Figure, figure
from simulations.benchmarks.runs import on, run_job, torch_threads
from simulations.datasets import load_dataset
from simulations.progress import ProgressListener
from simulations.setup import set_up
from tuning.backbones.backbone import SHIPPED_VIT
from tuning.compiler import Compiled, compile_recipe
from tuning.recipe import Recipe

STEPS: Final = 10
BATCH: Final = 8
METHODS: Final[Mapping[str, Mapping[str, Any]]] = {
    "full": {},
    "head": {},
    "lora": {"rank": 4},
    "lora-sb": {"rank": 8},
    "ssf": {},
    "adapter": {"width": 16},
    "one-bit-adapter": {"width": 16},
    "one-bit-lora": {"rank": 8},
    "prompt": {"length": 4},
    "peft": {"type": "LOHA", "r": 4},
}
TRAININGS: Final[Mapping[str, TrainingSpec]] = {
    "SGD": TrainingSpec(batch_size=BATCH, optimizer="sgd", learning_rate=0.01, momentum=0.9),
    "AdamW": TrainingSpec(
        batch_size=BATCH, optimizer="adamw", learning_rate=1e-3, weight_decay=0.01
    ),
}


TARGET: Final = 1e-5


@dataclass(frozen=True, slots=True)
class Trained:
    """Ten steps: the loss before each, and the tensors after the last."""

    losses: np.ndarray
    tensors: Tensors

    def distance(self, other: Trained) -> float:
        """The largest absolute difference of any loss or value."""
        most = float(np.abs(self.losses - other.losses).max())
        return max(most, largest_difference(self.tensors, other.tensors))


@dataclass(frozen=True, slots=True)
class Compared:
    """One method with one optimizer.

    `distance` lies between the graph and torch, `spread` between torch and itself: one thread,
    all of them, and double precision. Adam divides a gradient by its own size, and a quantiser
    rounds to one of two codes: where a gradient or a value lies at zero, the last bit of a sum
    decides, and no engine agrees with another, torch with one thread not with torch with two.
    """

    name: str
    distance: float
    spread: float

    @property
    def undecided(self) -> bool:
        """Torch disagrees with itself by more than the target, and the graph by no more than it."""
        return self.spread > TARGET and self.distance <= 2 * self.spread


def largest_difference(some: Tensors, others: Tensors) -> float:
    """Over all values of all tensors, which have the same names and shapes."""
    if some.keys() != others.keys():
        raise ValueError(f"different tensors: {sorted(some.keys() ^ others.keys())}")
    return max(
        float(np.abs(np.asarray(value, np.float64) - others[name]).max())
        for name, value in some.items()
    )


def onnx_parity(
    progress: ProgressListener,
    *,
    methods: Mapping[str, Mapping[str, Any]] = METHODS,
    trainings: Mapping[str, TrainingSpec] = TRAININGS,
    backbone: str | Path = SHIPPED_VIT,
) -> Figure:
    """`onnx_parity`: the compiled step against torch autograd and torch.optim, on digits."""
    dataset = load_dataset("digits", seed=0)
    found = []
    for method, settings in methods.items():
        for optimizer, training in trainings.items():
            progress.stage(f"parity: {method}, {optimizer}")
            recipe = Recipe(
                backbone=backbone,
                classes=len(dataset.class_names),
                seed=0,
                method=method,
                settings=settings,
                training=training,
            )
            compiled = compile_recipe(recipe)
            data = preprocess(compiled.preprocessing, dataset.train)
            steps = list(_steps(data))
            graph = _by_graph(recipe, compiled, steps)
            by_torch = _by_autograd(recipe, steps)
            with torch_threads(1):
                alone = _by_autograd(recipe, steps)
            precise = _by_autograd(recipe, steps, double=True)
            spread = max(by_torch.distance(other) for other in (alone, precise))
            name = f"{method} with {optimizer}"
            found.append(Compared(name, graph.distance(by_torch), spread))
    return parity_figure(found)


def parity_figure(found: Sequence[Compared]) -> Figure:
    """The largest distance of those that can be decided; the others are named beside it."""
    decided = [one for one in found if not one.undecided]
    note = f"{len(decided)} of {len(found)} pairs of method and optimizer over {STEPS} steps"
    if decided:
        note += f", largest: {max(decided, key=lambda one: one.distance).name}"
    note += "".join(
        f"; not decidable: {one.name}, {one.distance:.1e} where torch differs from itself by "
        f"{one.spread:.1e}"
        for one in found
        if one.undecided
    )
    worst = max((one.distance for one in decided), default=math.nan)
    return figure("onnx_parity", worst, target=f"<= {TARGET:.0e}", note=note)


def cohort_parity(progress: ProgressListener, job: Job | None = None) -> Figure:
    """`cohort_parity`: cohort against clients in turn, and each against itself, on digits."""
    setup = set_up(job or _parity_job(), progress)
    finals: dict[str, list[Tensors]] = {"cohort": [], "sequential": []}
    with tempfile.TemporaryDirectory() as folder:
        for backend, runs in finals.items():
            for number in (1, 2):
                progress.stage(f"parity: {backend}, run {number}")
                place = Path(folder) / f"{backend}-{number}"
                runs.append(run_job(on(setup, backend), place).tensors)
    uneven = [name for name, (one, two) in finals.items() if not _same_bytes(one, two)]
    verdict = f"two runs of {' and of '.join(uneven)} differ" if uneven else "two runs are equal"
    distance = largest_difference(finals["cohort"][0], finals["sequential"][0])
    rounds = setup.job.rounds.count
    made = figure(
        "cohort_parity",
        distance,
        target=f"<= {TARGET:.0e}",
        note=f"after {rounds} rounds of {len(setup.federation.clients)} uneven clients; {verdict}"
        " byte for byte",
    )
    # Equal bytes are a part of the promise that the number does not show.
    return replace(made, holds=False) if uneven else made


def _parity_job() -> Job:
    return Job(
        job=JobSection(name="cohort-parity"),
        data=DataSection(clients=20, partition="dirichlet:0.3", samples_per_client=60),
        method=MethodSpec(name="lora", settings={"rank": 4, "alpha": 8.0}),
        training=TrainingSection(optimizer="adamw", learning_rate=1e-3, batch_size=BATCH),
        rounds=RoundsSection(count=5, evaluate_every=5),
    )


def _same_bytes(some: Tensors, others: Tensors) -> bool:
    return all(value.tobytes() == others[name].tobytes() for name, value in some.items())


def _steps(data: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """Batches in the order of the data; the last is ragged, as clients' last batches are."""
    for number in range(STEPS):
        rows = slice(number * BATCH, (number + 1) * BATCH)
        weight = np.ones(BATCH, np.float32)
        if number == STEPS - 1:
            weight[BATCH // 2 :] = 0
        yield {
            "batch/pixel_values": data["pixel_values"][rows],
            "labels": data["labels"][rows],
            "weight": weight,
        }


def _by_graph(recipe: Recipe, compiled: Compiled, steps: list[dict[str, np.ndarray]]) -> Trained:
    from safetensors.numpy import load_file

    state = {name: np.zeros(spec.shape, spec.dtype) for name, spec in compiled.state.entries}
    loop = TrainingLoop(compiled.folder / "train.onnx")
    initial = load_file(compiled.folder / INITIAL_FILE)
    tensors, losses, _ = loop.run(initial, state, steps, recipe.training.learning_rate)
    return Trained(losses, tensors)


def _by_autograd(
    recipe: Recipe, steps: list[dict[str, np.ndarray]], *, double: bool = False
) -> Trained:
    """The loop that a torch user would write, ragged batch without padding."""
    import torch
    from torch.nn.functional import cross_entropy

    from tuning.optimizers import BETA_1, BETA_2, EPSILON

    _, tuned = recipe.build()
    dtype = torch.float64 if double else torch.float32
    tuned.module.to(dtype)
    parameters = dict(tuned.module.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    trained = {
        name: parameters[inside].requires_grad_(True) for name, inside in tuned.trainable.items()
    }
    spec = recipe.training
    optimizer: torch.optim.Optimizer
    if spec.optimizer == "adamw":
        optimizer = torch.optim.AdamW(
            trained.values(),
            lr=spec.learning_rate,
            betas=(BETA_1, BETA_2),
            eps=EPSILON,
            weight_decay=spec.weight_decay,
        )
    else:
        optimizer = torch.optim.SGD(
            trained.values(),
            lr=spec.learning_rate,
            momentum=spec.momentum,
            weight_decay=spec.weight_decay,
        )
    losses = []
    for step in steps:
        kept = step["weight"] > 0
        batch = {"pixel_values": torch.from_numpy(step["batch/pixel_values"][kept]).to(dtype)}
        labels = torch.from_numpy(step["labels"][kept])
        optimizer.zero_grad()
        loss = cross_entropy(tuned.module(**tuned.prepare(batch)).logits, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    tensors = {name: value.detach().numpy() for name, value in trained.items()}
    return Trained(np.asarray(losses), tensors)
