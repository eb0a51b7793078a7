# SPDX-License-Identifier: Apache-2.0
"""`fedloom bench wire`: what codecs save on the wire, and what they cost."""

from __future__ import annotations

import math
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Final

import numpy as np

from aggregation.codecs import codec_named
from coordinator.job import Job
from coordinator.sections import (
    DataSection,
    JobSection,
    MethodSpec,
    RoundsSection,
    TrainingSection,
    UpdateSection,
)
from protocol.tensors import Tensors
from protocol.update import UpdateHeader, pack_update
from simulations.benchmarks.codecs import (
    CANDIDATES,
    bytes_job,
    bytes_ratios,
    codec_vs_zlib,
    ternary_entropy_ratio,
)
from simulations.benchmarks.figure import Figure, figure
from simulations.benchmarks.runs import labelled, measured_if_possible, run_job
from simulations.errors import SimulationError
from simulations.progress import ProgressListener
from simulations.setup import set_up
from tuning.backbones import load_backbone
from tuning.backbones.backbone import SHIPPED_VIT
from tuning.errors import BackboneError
from tuning.methods import method_named

WIDTH: Final = 16
CLASSES: Final = 10
# What a user compares: method and codec of the update.
KINDS: Final[Mapping[str, tuple[str, str]]] = {
    "float32": ("adapter", "float32"),
    "one-bit": ("adapter", "one-bit"),
    "one-bit-adapter, float32": ("one-bit-adapter", "float32"),
    "one-bit-adapter, one-bit": ("one-bit-adapter", "one-bit"),
}


def figures(progress: ProgressListener, *, quick: bool = False) -> list[Figure]:
    """All of them. `quick` takes one seed and fewer rounds, and says so."""
    found = [
        one_bit_size_ratio(),
        measured_if_possible(
            lambda: one_bit_accuracy_gap(
                progress, accuracy_job(quick=quick), seeds=range(1) if quick else range(3)
            ),
            "one_bit_accuracy_gap",
            unit="points",
            target="<= 1.5",
        ),
    ]
    found += [ternary_entropy_ratio(), codec_vs_zlib()]
    try:
        found += bytes_ratios(
            progress,
            bytes_job(quick=quick),
            candidates=CANDIDATES[:1] if quick else CANDIDATES,
            seeds=(0,) if quick else (0, 1),
        )
    except (SimulationError, BackboneError) as missing:
        found += [
            figure(name, math.nan, target=target, note=str(missing))
            for name, target in (
                ("update_bytes_ratio", "<= 0.05"),
                ("bytes_to_accuracy_ratio", f"<= {1 / 15:.6f}"),
            )
        ]
    return labelled(found) if quick else found


def one_bit_size_ratio() -> Figure:
    """`one_bit_size_ratio`: whole update containers of the adapter's matrices, width 16."""
    backbone = load_backbone(SHIPPED_VIT, classes=CLASSES, seed=0)
    tuned = method_named("adapter", {"width": WIDTH}).attach(backbone, seed=0)
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.standard_normal(tuple(value.shape)).astype(np.float32)
        for name, value in tuned.parameters().items()
        if name.endswith((".down", ".up"))
    }
    small, large = (len(container(tensors, codec)) for codec in ("one-bit", "float32"))
    return figure(
        "one_bit_size_ratio",
        small / large,
        target=f"<= {1 / 28:.6f}",
        note=f"1/{large / small:.1f}: {small} of {large} bytes for {len(tensors)} matrices with "
        f"{sum(value.size for value in tensors.values())} values, containers and headers counted",
    )


def container(tensors: Tensors, codec: str) -> bytes:
    """An update as a simulated client sends it."""
    header = UpdateHeader(
        job=secrets.token_hex(32),
        round=10,
        nonce=secrets.token_hex(16),
        client="client-0042",
        codec=codec,
        samples=100,
        metrics={"loss": 0.123456},
    )
    return pack_update(header, codec_named(codec).encode(tensors))


def accuracy_job(*, quick: bool = False) -> Job:
    """The private half of Fashion-MNIST over 20 clients with uneven labels."""
    rounds = 3 if quick else 10
    return Job(
        job=JobSection(name="one-bit"),
        data=DataSection(
            dataset="fashion-mnist",
            clients=20,
            partition="dirichlet:0.3",
            held_out=0.0,
            samples_per_client=200,
        ),
        training=TrainingSection(optimizer="adamw", learning_rate=1e-3, batch_size=8),
        rounds=RoundsSection(count=rounds, evaluate_every=rounds),
    )


def one_bit_accuracy_gap(
    progress: ProgressListener, job: Job, *, seeds: Sequence[int] = range(3)
) -> Figure:
    """`one_bit_accuracy_gap`: points that 1-bit updates of the adapter lose, over seeds.

    `job` says everything but method and codec.

    Raises: DataError without Fashion-MNIST.
    """
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    uplink: dict[str, int] = {}
    for seed in seeds:
        for kind, (method, codec) in KINDS.items():
            progress.stage(f"one bit: {kind}, seed {seed}")
            own = replace(
                job,
                job=replace(job.job, seed=seed),
                method=MethodSpec(name=method, settings={"width": WIDTH}),
                update=UpdateSection(codec=codec),
            )
            setup = set_up(own, progress)
            with tempfile.TemporaryDirectory() as folder:
                outcome = run_job(setup, Path(folder) / "run")
            found[kind].append(outcome.accuracy)
            uplink[kind] = sum(report.uplink_bytes for report in outcome.reports)
    means = {kind: mean(accuracies) for kind, accuracies in found.items()}
    words = ", ".join(
        f"{kind} {value:.4f} ({uplink[kind] / 1e6:.2f} MB up)" for kind, value in means.items()
    )
    return figure(
        "one_bit_accuracy_gap",
        100 * (means["float32"] - means["one-bit"]),
        unit="points",
        target="<= 1.5",
        note=f"{words}; adapter width {WIDTH}, {len(seeds)} seeds, {job.rounds.count} rounds",
    )
