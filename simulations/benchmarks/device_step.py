# SPDX-License-Identifier: Apache-2.0
"""Seconds of one training step: the compiled graph beside torch, two threads each."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

import numpy as np

from edge_runtime import batch_plan
from edge_runtime.training_loop import TrainingLoop
from protocol.files import INITIAL_FILE
from protocol.manifest import TrainingSpec
from simulations.benchmarks.figure import Figure, figure
from simulations.benchmarks.runs import torch_threads
from simulations.progress import ProgressListener
from tuning.backbones.backbone import SHIPPED_VIT
from tuning.compiler import compile_recipe
from tuning.recipe import Recipe

THREADS: Final = 2
CLASSES: Final = 10
RATE: Final = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model and how often it steps: `steps` in a row, `repetitions` times."""

    name: str
    batch: int
    rank: int
    steps: int
    repetitions: int


SMALL: Final = Case(name="small ViT", batch=8, rank=4, steps=40, repetitions=5)
BASE: Final = Case(name="ViT-B/16", batch=4, rank=8, steps=2, repetitions=3)


def device_step_ratio(
    progress: ProgressListener,
    *,
    small: Case = SMALL,
    base: Case | None = BASE,
    backbone: str | Path = SHIPPED_VIT,
) -> Figure:
    """`device_step_ratio`: the worse of the shipped ViT and a ViT-B/16 with random weights."""
    ratios: dict[str, float] = {}
    words = []
    with tempfile.TemporaryDirectory() as folder:
        cases: list[tuple[Case, str | Path]] = [(small, backbone)]
        if base is not None:
            cases.append((base, save_vit_base(Path(folder) / "vit-base")))
        for case, model in cases:
            progress.stage(f"device: compiling {case.name}")
            # Of the large model nothing should stay behind in the user's cache.
            cache = Path(folder) / "cache" if case is base else None
            graph, autograd = step_seconds(case, model, cache, progress)
            ratios[case.name] = graph / autograd
            words.append(
                f"{case.name}, batch {case.batch}: {1000 * graph:.1f} ms beside "
                f"{1000 * autograd:.1f} ms = {graph / autograd:.2f}"
            )
    return figure(
        "device_step_ratio",
        max(ratios.values()),
        target="<= 0.8",
        note=f"{'; '.join(words)}; {THREADS} threads each",
    )


def step_seconds(
    case: Case, backbone: str | Path, cache: Path | None, progress: ProgressListener
) -> tuple[float, float]:
    """Medians over repetitions that take turns: (the graph's, torch's)."""
    from safetensors.numpy import load_file

    from tuning.torch_trainer import TorchTrainer

    recipe = Recipe(
        backbone=backbone,
        classes=CLASSES,
        seed=0,
        method="lora",
        settings={"rank": case.rank},
        training=TrainingSpec(batch_size=case.batch, optimizer="adamw", learning_rate=RATE),
    )
    compiled = compile_recipe(recipe, cache)
    initial = load_file(compiled.folder / INITIAL_FILE)
    state = {name: np.zeros(spec.shape, spec.dtype) for name, spec in compiled.state.entries}
    rows = case.batch * case.steps
    rng = np.random.default_rng(0)
    data = {
        name: rng.standard_normal((rows, *spec.shape)).astype(spec.dtype)
        for name, spec in compiled.inputs
    }
    data["labels"] = np.arange(rows, dtype=np.int64) % CLASSES

    loop = TrainingLoop(compiled.folder / "train.onnx", threads=THREADS)
    _, tuned = recipe.build()
    trainer = TorchTrainer(tuned, recipe.training, batch_plan=batch_plan)

    def steps() -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, rows, case.batch):
            part = slice(start, start + case.batch)
            batch = {f"batch/{name}": data[name][part] for name, _ in compiled.inputs}
            weight = np.ones(case.batch, np.float32)
            yield {**batch, "labels": data["labels"][part], "weight": weight}

    def by_graph() -> None:
        loop.run(initial, state, steps(), RATE)

    def by_torch() -> None:
        trainer.fit(initial, data, learning_rate=RATE, epochs=1, seed=0)

    taken: dict[str, list[float]] = {"graph": [], "torch": []}
    with torch_threads(THREADS):
        for number in range(case.repetitions + 1):
            progress.stage(f"device: {case.name} {number}/{case.repetitions}")
            for name, run in (("graph", by_graph), ("torch", by_torch)):
                started = time.perf_counter()
                run()
                if number:
                    taken[name].append((time.perf_counter() - started) / case.steps)
    return median(taken["graph"]), median(taken["torch"])


def save_vit_base(folder: Path) -> Path:
    """A ViT-B/16 for 224x224 images with random weights, as a Hugging Face folder of 330 MB."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.utils import logging

    progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # it would be drawn across ours
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            ViTForImageClassification(ViTConfig(num_labels=CLASSES)).save_pretrained(folder)
    finally:
        if progress:
            logging.enable_progress_bar()
    return folder
