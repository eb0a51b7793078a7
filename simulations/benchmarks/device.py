# SPDX-License-Identifier: Apache-2.0
"""`fedloom bench device`: a device's process and its training step, beside torch's."""

from __future__ import annotations

from dataclasses import replace

from simulations.benchmarks.device_start import device_start
from simulations.benchmarks.device_step import SMALL, device_step_ratio
from simulations.benchmarks.figure import Figure
from simulations.benchmarks.runs import labelled
from simulations.progress import ProgressListener


def figures(progress: ProgressListener, *, quick: bool = False) -> list[Figure]:
    """All three. `quick` repeats less and leaves the ViT-B/16 out, and says so."""
    if not quick:
        return [*device_start(progress), device_step_ratio(progress)]
    few = replace(SMALL, repetitions=2)
    found = [
        *device_start(progress, repetitions=1),
        device_step_ratio(progress, small=few, base=None),
    ]
    return labelled(found)
