# SPDX-License-Identifier: Apache-2.0
"""What the rest of a job must be where the server sees sums alone, and what to take instead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from aggregation.codecs import Grid, SumCodec, codec_named
from aggregation.selection import (
    MERGERS,
    described_merger,
    needs_accuracy,
    needs_counts,
    term_smoothing,
)
from coordinator.errors import Fault
from coordinator.toml_text import toml_value

if TYPE_CHECKING:
    from coordinator.job import Job
    from protocol.tensors import ParamSpec

_GRID: Final = 'take "grid:8,NORM", with NORM somewhat above the norm that updates have'
_FEEDBACK: Final = " with update.error_feedback = true"
_VOTES: Final = f'take "votes:NORM"{_FEEDBACK}'
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
    "ternary": f'{_PLACES}; take "votes:NORM,ternary"{_FEEDBACK}',
    "top-k": f'{_PLACES}; take "grid:8,NORM,DENSITY", the same random ones for all',
    "random-k": f'{_FLOATS}; take "grid:8,NORM,DENSITY", random values on a common grid',
    "low-rank": f"the sum of factors is not the factors of the sum; {_GRID}",
    "seed-scalars": f'{_FLOATS}; take "grid:8,NORM,DENSITY", a random part of a rotated update',
}
"""By the codec's name, why its payloads cannot be added under a mask, and what can."""


def summing_faults(job: Job) -> list[Fault]:
    """What a job with secure sums does not go with; of others, what needs them."""
    if job.privacy.secure_aggregation:
        return list(_faults(job))
    merger = job.aggregation.merger
    if not term_smoothing(described_merger(merger)):
        return []
    words = (
        "expected another rule, or privacy.secure_aggregation = true: where single updates are "
        'seen, "geometric-median" finds the median itself, in one round'
    )
    return [Fault(key="aggregation.merger", value=merger, allowed=words)]


def _faults(job: Job) -> Iterator[Fault]:
    rounds, aggregation, codec = job.rounds, job.aggregation, job.update.codec
    merger = described_merger(aggregation.merger)
    smoothing = term_smoothing(merger)
    if smoothing:
        yield from _term_faults(job, smoothing)
    elif not isinstance(codec_named(codec), SumCodec):
        why = _WHY.get(codec.partition(":")[0], _GRID)
        if job.privacy.is_private:  # which refuses it
            why = why.removesuffix(_FEEDBACK)
        words = f"expected a codec whose payloads can be summed: {why}"
        yield Fault(key="update.codec", value=codec, allowed=words)
    if not smoothing and (not merger.sum_only or needs_counts(merger)):
        fitting = ", ".join(name for name in MERGERS if _fits(name))
        words = f"expected a rule that needs no more than the sum of updates: {fitting}"
        yield Fault(key="aggregation.merger", value=aggregation.merger, allowed=words)
    asked = min(rounds.asked or job.data.clients, job.data.clients)
    if asked < job.privacy.min_survivors:
        words = f"expected at most the {asked} clients of a round"
        yield Fault(key="privacy.min_survivors", value=job.privacy.min_survivors, allowed=words)
    if aggregation.weighting == "samples" and not job.privacy.is_private and not smoothing:
        yield from _weight_faults(job)
    wanted: dict[str, tuple[object, object, str]] = {
        "rounds.mode": (
            rounds.mode, "sync", "a sum is of clients that started from the same tensors"
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


def _weight_faults(job: Job) -> Iterator[Fault]:
    """What weights that are summed with the updates need."""
    aggregation, codec = job.aggregation, job.update.codec
    if isinstance(codec_named(codec), SumCodec) and not isinstance(codec_named(codec), Grid):
        words = (
            f'expected another codec with aggregation.weighting = "samples": a vote is worth the '
            f'same whatever it is multiplied by; {_GRID}, or aggregation.weighting = "uniform"'
        )
        yield Fault(key="update.codec", value=codec, allowed=words)
    if not aggregation.full_weight_samples:
        words = (
            "expected the number of samples from which a client has the full weight, about as many "
            "as the larger clients have: weights are summed as shares of it, and none is told; or "
            'aggregation.weighting = "uniform"'
        )
        yield Fault(key="aggregation.full_weight_samples", value=0, allowed=words)


def _term_faults(job: Job, smoothing: float) -> Iterator[Fault]:
    """What terms need that clients make of their updates, around a centre."""
    codec = codec_named(job.update.codec)
    if not isinstance(codec, Grid) or codec.norm != smoothing or codec.density < 1:
        fitting = Grid(bits=codec.bits if isinstance(codec, Grid) else 8, norm=smoothing).name
        words = (
            f'expected "{fitting}" with aggregation.merger = "{job.aggregation.merger}": the terms '
            "that clients send are as long as its smoothing at most, and whole"
        )
        yield Fault(key="update.codec", value=codec.name, allowed=words)
    wanted: dict[str, tuple[object, object, str]] = {
        "aggregation.weighting": (
            job.aggregation.weighting, "uniform",
            "updates weigh by their distance, and the number of samples is the client's word",
        ),
        "update.error_feedback": (
            job.update.error_feedback, False,
            "what a codec left behind is of another centre",
        ),
        "update.downlink": (
            job.update.downlink, "tensors", "a round's centre is sent whole, and so are its tensors"
        ),
    }  # fmt: skip
    for name, (found, value, why) in wanted.items():
        if found != value:
            words = f"expected {toml_value(value)} with the terms of a masked median: {why}"
            yield Fault(key=name, value=found, allowed=words)


def _fits(name: str) -> bool:
    merger = described_merger(name)
    if term_smoothing(merger):
        return True
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
