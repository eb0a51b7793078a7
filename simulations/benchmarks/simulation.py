# SPDX-License-Identifier: Apache-2.0
"""`fedloom bench simulation`: parity, throughput and memory of the cohort, and what is learned."""

from __future__ import annotations

from simulations.benchmarks.accuracy import (
    central_gap,
    image_job,
    text_central_gap,
    text_job,
)
from simulations.benchmarks.command import demo_accuracy, help_seconds
from simulations.benchmarks.fedins import fedins_margin
from simulations.benchmarks.figure import Figure
from simulations.benchmarks.memory import SCALE, cohort_memory_mb
from simulations.benchmarks.parity import METHODS, cohort_parity, onnx_parity
from simulations.benchmarks.runs import labelled, measured_if_possible
from simulations.benchmarks.throughput import QUICK, Scale, cohort_vs_flower, throughput
from simulations.progress import ProgressListener


def figures(progress: ProgressListener, *, quick: bool = False) -> list[Figure]:
    """All of them, in the order of the table. `quick` measures less of each, and says so."""
    scale = QUICK if quick else Scale()
    few = {name: METHODS[name] for name in ("lora", "one-bit-adapter")}
    found = [
        onnx_parity(progress, methods=few if quick else METHODS),
        cohort_parity(progress),
        *throughput(progress, scale),
        measured_if_possible(
            lambda: cohort_vs_flower(progress, scale), "cohort_vs_flower", target=">= 2.2"
        ),
        measured_if_possible(
            lambda: cohort_memory_mb(progress, SCALE), "cohort_memory_mb", unit="MB"
        ),
        measured_if_possible(lambda: demo_accuracy(progress), "demo_accuracy", target=">= 0.93"),
        help_seconds(progress),
        measured_if_possible(
            lambda: text_central_gap(progress, text_job(quick=quick)),
            "text_central_gap",
            unit="points",
            target="<= 5",
        ),
        measured_if_possible(
            lambda: central_gap(progress, image_job(quick=quick)), "central_gap", unit="points"
        ),
        measured_if_possible(
            lambda: fedins_margin(progress, quick=quick),
            "fedins_margin",
            unit="points",
            target="> 0",
        ),
    ]
    return labelled(found) if quick else found
