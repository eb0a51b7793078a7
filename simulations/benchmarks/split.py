# SPDX-License-Identifier: Apache-2.0
"""`fedloom bench split`: what is exact about split training, what it costs, and how fast it is."""

from __future__ import annotations

from dataclasses import replace

from simulations.benchmarks.figure import Figure
from simulations.benchmarks.runs import labelled, measured_if_possible
from simulations.benchmarks.split_accuracy import accuracy_gap
from simulations.benchmarks.split_costs import device_flops_share, traffic_share
from simulations.benchmarks.split_exact import plain_split_parity, split_parity
from simulations.benchmarks.split_load import (
    half_open_p99_ms,
    slow_loris_p99_ms,
    split_batching_ratio,
)
from simulations.benchmarks.split_privacy import reconstruction_psnr_db
from simulations.benchmarks.split_rate import BASE, SMALL, split_lanes_ratio, split_rate_ratio
from simulations.progress import ProgressListener


def figures(progress: ProgressListener, *, quick: bool = False) -> list[Figure]:
    """All of them. `quick` repeats less, and says so."""
    found = [
        split_parity(progress),
        plain_split_parity(progress),
        device_flops_share(),
        traffic_share(),
        traffic_share(pooled=True),
        measured_if_possible(
            lambda: accuracy_gap(progress, quick=quick), "accuracy_gap", unit="points"
        ),
        split_rate_ratio(
            progress,
            small=replace(SMALL, repetitions=2) if quick else SMALL,
            base=None if quick else BASE,
        ),
        split_lanes_ratio(progress),
        split_batching_ratio(progress, repetitions=1 if quick else 5),
        slow_loris_p99_ms(progress, uploads=100 if quick else 1_000),
        half_open_p99_ms(progress, connections=100 if quick else 1_000),
        measured_if_possible(
            lambda: reconstruction_psnr_db(progress, known=2_000 if quick else 12_000),
            "reconstruction_psnr_db",
            unit="dB",
        ),
    ]
    return labelled(found) if quick else found
