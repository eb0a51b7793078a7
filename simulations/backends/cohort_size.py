# SPDX-License-Identifier: Apache-2.0
"""How many clients to put into one cohort: as many as make a step cheapest, by measurement.

A larger cohort has fewer calls and larger matrix products, until its tensors no longer fit the
processor's caches. Where that is depends on the model and the machine, so a long run tries a few
sizes first; what was found is kept beside the compiled graphs. A short run takes the default,
since compiling several graphs to save a second would be no gain.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from typing import Final

import numpy as np

from coordinator.job import Job
from edge_runtime.training_loop import TrainingLoop
from reports.machine import usable_cores
from tuning.compiler import Compiled, cohort_graph
from tuning.recipe import Recipe

DEFAULT_SIZE: Final = 20
CANDIDATES: Final = (5, 20, 40)
# What a step reads and writes again and again (tensors, gradients, two moments) should stay in the
# cache: with full fine-tuning, twenty clients at once are slower than one after another.
CACHE_BYTES: Final = 32 * 2**20
# A run is long from here on; at some 5e10 operations a second and core, about half an hour.
LONG_RUN_FLOPS: Final = 9e13
_TRIALS: Final = 4
_FILE: Final = "cohort-sizes.json"


def cohort_size(
    job: Job, compiled: Compiled, recipe: Recipe, clients: int, training_samples: int
) -> int:
    """`simulation.cohort_size` where the job sets it, else the best that is known or measured.

    The answer fills cohorts evenly: 100 clients at most 40 at a time are 3 cohorts of 34.
    """
    asked = job.rounds.clients_per_round
    at_once = min(clients, asked) if asked else clients
    largest = job.simulation.cohort_size
    if not largest:
        passes = job.rounds.count * job.training.local_epochs * at_once / clients
        steps = training_samples * passes / recipe.training.batch_size
        if job.training.local_steps:
            steps = min(steps, job.rounds.count * at_once * job.training.local_steps)
        long = steps * compiled.step_flops > LONG_RUN_FLOPS * usable_cores()
        seconds = _known(compiled)
        if not seconds and long and at_once > min(CANDIDATES):
            seconds = _measure(compiled, recipe)
        # A private step has the gradients of every sample of the batch.
        gradients = recipe.training.batch_size if recipe.training.privacy else 1
        fitting = max(CACHE_BYTES // ((3 + gradients) * compiled.trainable.nbytes), 1)
        default = min(DEFAULT_SIZE, fitting)
        largest = min(seconds, key=lambda size: seconds[size]) if seconds else default
    return math.ceil(at_once / math.ceil(at_once / largest))


def _known(compiled: Compiled) -> Mapping[int, float]:
    """Seconds a client and step by cohort size, as measured on this many cores; else empty."""
    path = compiled.folder / _FILE
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8")).get(str(usable_cores()), {})
    return {int(size): float(value) for size, value in found.items()}


def _measure(compiled: Compiled, recipe: Recipe) -> Mapping[int, float]:
    seconds = {size: _seconds_per_client(compiled, recipe, size) for size in CANDIDATES}
    path = compiled.folder / _FILE
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    kept[str(usable_cores())] = seconds
    path.write_text(json.dumps(kept, sort_keys=True), encoding="utf-8")
    return seconds


def _seconds_per_client(compiled: Compiled, recipe: Recipe, size: int) -> float:
    """The fastest of a few steps on made-up data: other work on the machine only adds to it."""
    loop = TrainingLoop(cohort_graph(compiled, recipe, size))
    batch = recipe.training.batch_size
    step = {
        f"batch/{name}": np.zeros((size, batch, *spec.shape), spec.dtype)
        for name, spec in compiled.inputs
    }
    step["labels"] = np.zeros((size, batch), np.int64)
    step["weight"] = np.ones((size, batch), np.float32)
    if recipe.training.privacy is not None:
        step["applies"] = np.ones(size, np.float32)
        step["noise"] = np.zeros((size, compiled.trainable.size), np.float32)
    tensors, state = (
        {name: np.zeros((size, *part.shape), part.dtype) for name, part in spec.entries}
        for spec in (compiled.trainable, compiled.state)
    )
    took = []
    for _ in range(_TRIALS):
        started = time.perf_counter()
        loop.run(tensors, state, [step], 0.0)
        took.append(time.perf_counter() - started)
    return min(took) / size
