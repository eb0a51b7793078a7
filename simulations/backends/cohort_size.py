# SPDX-License-Identifier: Apache-2.0
"""How many clients to put into one cohort."""

from __future__ import annotations

import math
from typing import Final

from coordinator.job import Job
from tuning.compiler import Compiled
from tuning.recipe import Recipe

DEFAULT_SIZE: Final = 20


def cohort_size(job: Job, compiled: Compiled, recipe: Recipe, clients: int) -> int:
    """The job's own `simulation.cohort_size`, or one that fills cohorts evenly."""
    asked = job.rounds.clients_per_round
    at_once = min(clients, asked) if asked else clients
    largest = job.simulation.cohort_size or DEFAULT_SIZE
    return math.ceil(at_once / math.ceil(at_once / largest))
