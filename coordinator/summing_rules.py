# SPDX-License-Identifier: Apache-2.0
"""What the rest of a job must be where the server sees sums alone, and what to take instead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from aggregation.codecs import SumCodec, codec_named
from aggregation.selection import MERGERS, described_merger, needs_accuracy, needs_counts
from coordinator.errors import Fault
from coordinator.toml_text import toml_value

if TYPE_CHECKING:
    from coordinator.job import Job
    from protocol.tensors import ParamSpec

_GRID: Final = 'take "grid:8,NORM", with NORM somewhat above the norm that updates have'
_VOTES: Final = 'take "votes:NORM" with update.error_feedback = true'
_SCALES: Final = "each client has a scale of its own"
_PLACES: Final = "each client chooses positions of its own"
_FLOATS: Final = "floats have no modulus, and a mask would show through"
_WHY: Final = {
    "float32": f"{_FLOATS}; {_GRID}",
    "float16": f"{_FLOATS}; {_GRID}",
    "bfloat16": f"{_FLOATS}; {_GRID}",
    "int8": f"{_SCALES}; {_GRID}",
    "int4": f'{_SCALES}; take "grid:4,NORM"',
    "one-bit": f"{_SCALES}; {_VOTES}",
    "ternary": f'{_PLACES}; take "votes:NORM,ternary" with update.error_feedback = true',
    "top-k": f'{_PLACES}; take "grid:8,NORM,DENSITY", the same random ones for all',
    "random-k": f'{_FLOATS}; take "grid:8,NORM,DENSITY", random values on a common grid',
    "low-rank": f"the sum of factors is not the factors of the sum; {_GRID}",
    "seed-scalars": f'{_FLOATS}; take "grid:8,NORM,DENSITY", a random part of a rotated update',
}
"""By the codec's name, why its payloads cannot be added under a mask, and what can."""


def summing_faults(job: Job) -> list[Fault]:
    """What a job with secure sums does not go with; none for others."""
    return list(_faults(job)) if job.privacy.secure_aggregation else []


def _faults(job: Job) -> Iterator[Fault]:
    rounds, aggregation, codec = job.rounds, job.aggregation, job.update.codec
    if not isinstance(codec_named(codec), SumCodec):
        why = _WHY.get(codec.partition(":")[0], _GRID)
        words = f"expected a codec whose payloads can be summed: {why}"
        yield Fault(key="update.codec", value=codec, allowed=words)
    merger = described_merger(aggregation.merger)
    if not merger.sum_only or needs_counts(merger):
        fitting = ", ".join(name for name in MERGERS if _fits(name))
        words = f"expected a rule that needs no more than the sum of updates: {fitting}"
        yield Fault(key="aggregation.merger", value=aggregation.merger, allowed=words)
    asked = min(rounds.asked or job.data.clients, job.data.clients)
    if asked < job.privacy.min_survivors:
        words = f"expected at most the {asked} clients of a round"
        yield Fault(key="privacy.min_survivors", value=job.privacy.min_survivors, allowed=words)
    wanted: dict[str, tuple[object, object, str]] = {
        "rounds.mode": (
            rounds.mode, "sync", "a sum is of clients that started from the same tensors"
        ),
        "aggregation.weighting": (
            aggregation.weighting, "uniform", "how many samples a client has stays with it"
        ),
        "aggregation.ranks": (
            aggregation.ranks, "", "updates of several ranks have no common sum"
        ),
        "training.scaffold": (
            job.training.scaffold, False, "control variates have another scale than updates"
        ),
    }  # fmt: skip
    for name, (found, value, why) in wanted.items():
        if found != value:
            words = f"expected {toml_value(value)} with privacy.secure_aggregation: {why}"
            yield Fault(key=name, value=found, allowed=words)
    if job.privacy.is_private and job.privacy.clip_quantile:
        words = (
            "expected 0 with privacy.secure_aggregation: the codec's grid belongs to one clipping "
            "norm"
        )
        yield Fault(key="privacy.clip_quantile", value=job.privacy.clip_quantile, allowed=words)
    if job.simulation.backend == "ray":
        words = (
            'expected "cohort" or "sequential": simulated clients keep the keys of secure sums in '
            "one process"
        )
        yield Fault(key="simulation.backend", value="ray", allowed=words)


def _fits(name: str) -> bool:
    merger = described_merger(name)
    return merger.sum_only and not needs_counts(merger) and not needs_accuracy(merger)


def reach_faults(job: Job, shared: ParamSpec) -> list[Fault]:
    """Where the server noises a sum of updates that it has not seen: a codec whose rounding could
    carry one beyond the clipping norm that the noise is for. `shared`: of the tensors that clients
    send."""
    codec = codec_named(job.update.codec)
    if not (job.privacy.secure_aggregation and job.privacy.is_central):
        return []
    if not isinstance(codec, SumCodec) or (reach := codec.reach(shared)) <= job.privacy.clip:
        return []
    words = (
        f'expected at least {reach:.6g} with codec "{codec.name}": what it makes of an update of '
        "its norm may be as long as that, and nobody can cut single updates any more"
    )
    return [Fault(key="privacy.clip", value=job.privacy.clip, allowed=words)]
