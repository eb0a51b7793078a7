# SPDX-License-Identifier: Apache-2.0
"""What a process costs that starts, trains one step and ends, as Flower starts one a message."""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median
from typing import Final

from coordinator.job import Job
from coordinator.sections import (
    BackboneSection,
    DataSection,
    JobSection,
    MethodSpec,
    TrainingSection,
)
from simulations.benchmarks.device_process import BATCH, RANK, RATE
from simulations.benchmarks.figure import Figure, figure
from simulations.benchmarks.processes import last_line, python, run_command
from simulations.progress import ProgressListener
from simulations.run import build_bundle
from tuning.backbones import backbone_folder
from tuning.backbones.backbone import SHIPPED_VIT

_MODULE: Final = "simulations.benchmarks.device_process"


def device_start(
    progress: ProgressListener, *, repetitions: int = 5, backbone: Path | None = None
) -> list[Figure]:
    """`device_start_ratio` and `device_memory_ratio`: the bundle beside torch and its libraries.

    Wall time from the start of the interpreter to its end; the processes take turns, after one of
    each that fills the file cache. Memory is the largest resident set that the kernel counted.
    """
    progress.stage("device: building a bundle")
    job = Job(
        job=JobSection(name="device-start"),
        backbone=BackboneSection(name="", path=str(backbone)) if backbone else BackboneSection(),
        data=DataSection(dataset="digits", clients=1),
        method=MethodSpec(name="lora", settings={"rank": RANK, "alpha": 2.0 * RANK}),
        training=TrainingSection(optimizer="adamw", learning_rate=RATE, batch_size=BATCH),
    )
    with tempfile.TemporaryDirectory() as folder:
        bundle = build_bundle(job, Path(folder) / "bundle")
        places = {"onnx": bundle, "torch": backbone or backbone_folder(SHIPPED_VIT)}
        seconds: dict[str, list[float]] = {way: [] for way in places}
        peaks: dict[str, list[int]] = {way: [] for way in places}
        for number in range(repetitions + 1):
            for way, place in places.items():
                progress.stage(f"device: start {number}/{repetitions}, {way}")
                ran = run_command(python(_MODULE, way, str(place)))
                if number:
                    seconds[way].append(ran.seconds)
                    peaks[way].append(int(last_line(ran.output)))
    starts = {way: median(values) for way, values in seconds.items()}
    sizes = {way: median(values) / 2**20 for way, values in peaks.items()}
    return [
        figure(
            "device_start_ratio",
            starts["onnx"] / starts["torch"],
            target="<= 0.125",
            note=f"start to first step {starts['onnx']:.2f} s, with torch, transformers and peft "
            f"{starts['torch']:.2f} s",
        ),
        figure(
            "device_memory_ratio",
            sizes["onnx"] / sizes["torch"],
            target="<= 0.3333",
            note=f"peak {sizes['onnx']:.0f} MB beside {sizes['torch']:.0f} MB",
        ),
    ]
