# SPDX-License-Identifier: Apache-2.0
"""`fedloom bench device`: a device's processes, its training step and its predictions."""

from __future__ import annotations

from dataclasses import replace

from simulations.benchmarks.device_idle import device_idle_mb
from simulations.benchmarks.device_round import device_round_seconds
from simulations.benchmarks.device_start import device_start
from simulations.benchmarks.device_step import SMALL, device_step_ratio
from simulations.benchmarks.figure import Figure
from simulations.benchmarks.instance import (
    batch_invariance,
    folded_ssf,
    parameters,
    pool_of_one,
)
from simulations.benchmarks.instance_latency import adapter_switch_ratio, instance_latency_ratio
from simulations.benchmarks.runs import labelled
from simulations.progress import ProgressListener


def figures(progress: ProgressListener, *, quick: bool = False) -> list[Figure]:
    """All twelve. `quick` repeats less and leaves the ViT-B/16 out, and says so."""
    exact = (batch_invariance, pool_of_one, folded_ssf)
    if not quick:
        return [
            *device_start(progress),
            device_idle_mb(progress),
            device_round_seconds(progress),
            device_step_ratio(progress),
            *(measure(progress) for measure in exact),
            *parameters(progress),
            instance_latency_ratio(progress),
            adapter_switch_ratio(progress),
        ]
    few = replace(SMALL, repetitions=2)
    found = [
        *device_start(progress, repetitions=1),
        device_idle_mb(progress, samples=1),
        device_round_seconds(progress, repetitions=1),
        device_step_ratio(progress, small=few, base=None),
        *(measure(progress) for measure in exact),
        *parameters(progress),
        instance_latency_ratio(progress, repetitions=3, base=False),
        adapter_switch_ratio(progress, repetitions=3),
    ]
    return labelled(found)
