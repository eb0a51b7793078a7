# SPDX-License-Identifier: Apache-2.0
"""Whole jobs of which the server sees sums alone, beside the same updates seen one by one."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from aggregation.codecs import SumCodec, codec_named, round_seeds
from client_sdk.memory import FolderMemory
from client_sdk.summing import held
from coordinator.job import Job
from coordinator.privacy_section import PrivacySection
from coordinator.sections import AggregationSection, RoundsSection, UpdateSection
from protocol.files import INITIAL_FILE
from protocol.tensors import ParamSpec, Tensors
from simulations.backends.prepared import MEMORY_FOLDER
from simulations.benchmarks.figure import Figure, figure
from simulations.benchmarks.instance import make_job
from simulations.benchmarks.runs import run_job
from simulations.progress import ProgressListener, SilentProgress
from simulations.setup import Setup, set_up

NAME: Final = "secure_job_gap"

JOBS: Final[Mapping[str, tuple[Mapping[str, Any], UpdateSection]]] = {
    "fedins": ({"elements": 5, "selected": 2}, UpdateSection(codec="grid:8,2.0")),
    "one-bit-adapter": ({}, UpdateSection(codec="votes:2.0", error_feedback=True)),
}


def secure_job_gap(progress: ProgressListener, *, backbone: Path | None = None) -> Figure:
    """`secure_job_gap`: how far the tensors are, after a round of secure sums, from those that the
    same quantised updates give when they are averaged in the clear, in steps of the quantisation.

    The note says how far (root mean square) they are from the mean of float32 updates, too.
    """
    worst, words = 0.0, []
    for method, (settings, update) in JOBS.items():
        progress.stage(f"secure sums: a round of {method}")
        found = _gap(method, settings, update, backbone)
        worst = max(worst, found["gap"])
        words.append(f"{method} {found['gap']:.1e}, from float32 {found['loss']:.2f} steps")
    return figure(NAME, worst, unit="steps", target="<= 1", note="; ".join(words))


def _gap(
    method: str, settings: Mapping[str, Any], update: UpdateSection, backbone: Path | None
) -> dict[str, float]:
    from safetensors.numpy import load_file

    def job(**sections: Any) -> Job:
        return make_job(
            method,
            settings,
            backbone,
            rounds=RoundsSection(count=1),
            aggregation=AggregationSection(weighting="uniform"),
            **sections,
        )

    with tempfile.TemporaryDirectory() as place:
        secure = set_up(
            job(update=update, privacy=PrivacySection(secure_aggregation=True)), SilentProgress()
        )
        plain = set_up(job(), SilentProgress())
        first = run_job(secure, Path(place) / "secure")
        other = run_job(plain, Path(place) / "plain")
        start = load_file(Path(place) / "secure" / "bundle" / INITIAL_FILE)
        spec = ParamSpec.of(start)
        mean = mean_in_the_clear(secure, Path(place) / "secure", spec)
    codec = codec_named(update.codec)
    assert isinstance(codec, SumCodec)
    step = codec.step(spec)
    moved = {name: first.tensors[name] - value for name, value in start.items()}
    lost = spec.flatten({name: first.tensors[name] - other.tensors[name] for name in start})
    return {
        "gap": max(float(np.abs(moved[name] - mean[name]).max()) for name in moved) / step,
        "loss": math.sqrt(float(np.square(lost, dtype=np.float64).mean())) / step,
    }


def mean_in_the_clear(setup: Setup, folder: Path, spec: ParamSpec) -> Tensors:
    """The mean of what a run's clients have kept for its first secure sum."""
    codec, seeds = codec_named(setup.job.update.codec), round_seeds(setup.job.hash(), 1)
    assert isinstance(codec, SumCodec)
    clients = [client.id for client in setup.federation.clients]
    kept = [held(FolderMemory.of(folder / MEMORY_FOLDER, one), 1) for one in clients]
    sums = np.sum([one.integers(32) for one in kept], axis=0, dtype=np.uint64)
    return codec.mean(sums, len(kept), spec, seeds=seeds)
