# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a whole simulation, beside Flower's.

Each is a fresh process that plays the job of `throughput` and writes the adapter, as a simulation
does; compiled graphs are cached before. Run as `python -m simulations.benchmarks.memory WAY ...`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Final

from simulations.benchmarks.figure import Figure, figure
from simulations.benchmarks.processes import Ran, python, run_command
from simulations.benchmarks.runs import on, run_job
from simulations.benchmarks.throughput import Scale, throughput_setup
from simulations.errors import SimulationError
from simulations.progress import ProgressListener

SCALE: Final = Scale(rounds=2)
WAYS: Final = ("cohort", "ray-torch", "ray-onnx")


def cohort_memory_mb(progress: ProgressListener, scale: Scale = SCALE) -> Figure:
    """`cohort_memory_mb`: peak of the process tree; holds at a third of what Ray takes.

    Raises: SimulationError without Ray, or without /proc.
    """
    if not Path("/proc/self/smaps_rollup").is_file():
        raise SimulationError("memory is read from /proc/PID/smaps_rollup, which only Linux has")
    peaks: dict[str, Ran] = {}
    progress.stage("memory: compiling")
    play_way("cohort", scale)
    for way in WAYS:
        progress.stage(f"memory: {way}")
        numbers = map(str, (scale.clients, scale.images, scale.rounds, scale.backbone))
        peaks[way] = run_command(
            python("simulations.benchmarks.memory", way, *numbers), watch_memory=True
        )
    ours, flower, flower_onnx = (peaks[way] for way in WAYS)
    return figure(
        "cohort_memory_mb",
        ours.peak_mb,
        unit="MB",
        target=f"<= {flower.peak_mb / 3:.0f}",
        note=f"a third of Ray's; Ray with torch clients {flower.peak_mb:.0f} MB in "
        f"{flower.processes} processes, with our engine {flower_onnx.peak_mb:.0f} MB",
    )


def play_way(way: str, scale: Scale) -> None:
    """The job from its compiled step to its adapter, on one backend."""
    from tuning.export import export_result

    setup = throughput_setup(scale)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        if way == "cohort":
            outcome = run_job(on(setup, "cohort"), run)
        else:
            from simulations.backends.ray import onnx_engine
            from simulations.benchmarks.flower import TorchEngine, run_on_flower

            engine = TorchEngine(1) if way == "ray-torch" else onnx_engine
            outcome = run_on_flower(setup, run, engine)
        export_result(setup.recipe, outcome.tensors, run / "adapter", run / "bundle")


def main(arguments: list[str]) -> None:
    """What a measured process runs."""
    way, clients, images, rounds, backbone = arguments
    scale = Scale(clients=int(clients), images=int(images), rounds=int(rounds), backbone=backbone)
    play_way(way, scale)


if __name__ == "__main__":
    main(sys.argv[1:])
