# SPDX-License-Identifier: Apache-2.0
"""What the rest of a job must be where updates are private."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final

from aggregation.selection import described_merger, term_smoothing
from coordinator.errors import Fault
from coordinator.toml_text import toml_value

if TYPE_CHECKING:
    from coordinator.job import Job


def privacy_faults(job: Job) -> list[Fault]:
    """What a private job does not go with; none where the job is not private."""
    if not job.privacy.is_private:
        return []
    faults = [*_delta_faults(job), *_setting_faults(job)]
    if job.privacy.is_central:
        return [*faults, *_sampling_faults(job)]
    return [*faults, *_own_noise_faults(job)]


def _delta_faults(job: Job) -> Iterator[Fault]:
    privacy = job.privacy
    population = privacy.population or job.data.clients
    if privacy.delta * population >= 1:
        words = (
            f"expected less than 1/{population}, one in the number of clients: delta is a chance "
            "that nothing is promised about, and would cover publishing one of them whole"
        )
        yield Fault(key="privacy.delta", value=privacy.delta, allowed=words)


def _sampling_faults(job: Job) -> Iterator[Fault]:
    privacy, drawn = job.privacy, job.rounds.clients_per_round
    population = privacy.population or job.data.clients
    if privacy.sampling == "all":
        if drawn:
            words = 'expected 0 with privacy.sampling = "all", or another way of sampling'
            yield Fault(key="rounds.clients_per_round", value=drawn, allowed=words)
    elif not drawn:
        words = (
            f'expected the clients that a round draws with privacy.sampling = "{privacy.sampling}" '
            '(above 0), or privacy.sampling = "all"'
        )
        yield Fault(key="rounds.clients_per_round", value=drawn, allowed=words)
    elif drawn > population:
        words = f"expected at least rounds.clients_per_round = {drawn}, or 0"
        yield Fault(key="privacy.population", value=population, allowed=words)


_COUNTED: Final[Mapping[str, tuple[object, str]]] = {
    "rounds.quorum": (
        0,
        "who is among the first depends on more than the drawing that is accounted for; "
        "rounds.deadline_s ends a round by the clock",
    ),
    "rounds.over_selection": (
        1.0,
        "who is among the first depends on more than the drawing that is accounted for",
    ),
    "rounds.min_updates": (
        1,
        "a round is released however few updates came: whether it is would tell their number",
    ),
    "aggregation.merger": (
        "weighted-mean",
        "noise hides a client in a sum; other rules give one client more influence than that "
        '(LoRA: aggregation.factors = "up" averages B alone)',
    ),
}
"""What the server's noise asks of a round beside what every private job does; with clients' own
noise all of that comes after, and costs nothing."""
_PRIVATE: Final[Mapping[str, tuple[object, str]]] = {
    "rounds.mode": (
        "sync",
        "whose update a step takes depends on who is quick, which no accounting covers",
    ),
    "aggregation.weighting": (
        "uniform",
        "an update weighted by its samples could be larger than the noise hides",
    ),
    "update.metrics": (
        "",
        "what clients tell of their training leaves them without noise",
    ),
    "update.error_feedback": (
        False,
        "what a codec left behind makes updates longer than the clipping norm",
    ),
    "data.held_out": (
        0.0,
        "tests on clients' held-out samples would be told without noise",
    ),
    "personal.report": (
        False,
        "tests on clients' held-out samples would be told without noise",
    ),
    "training.scaffold": (
        False,
        "a control variate is a second release of every client, which nothing accounts for",
    ),
}


def _setting_faults(job: Job) -> Iterator[Fault]:
    """Keys that must have one value, each with the reason."""
    wanted = {**_COUNTED, **_PRIVATE} if job.privacy.is_central else _PRIVATE
    for name, (value, why) in wanted.items():
        section, _, field = name.partition(".")
        found = getattr(getattr(job, section), field)
        if found != value:
            words = f'expected {toml_value(value)} with privacy.mode = "{job.privacy.mode}": {why}'
            yield Fault(key=name, value=found, allowed=words)
    if job.is_split:
        words = (
            f'expected another method with privacy.mode = "{job.privacy.mode}": hidden states '
            "leave the device beside its update, and no noise covers them"
        )
        yield Fault(key="method.name", value=job.method.name, allowed=words)


def _own_noise_faults(job: Job) -> Iterator[Fault]:
    """What does not go with noise that clients add."""
    privacy = job.privacy
    if privacy.clip_quantile:
        words = f'expected 0 with privacy.mode = "{privacy.mode}": the norm is told to nobody'
        yield Fault(key="privacy.clip_quantile", value=privacy.clip_quantile, allowed=words)
    if privacy.mode == "local":
        if privacy.secure_aggregation:
            words = (
                'expected false with privacy.mode = "local", or "distributed": in a secure sum a '
                "share of the noise is enough from each client"
            )
            yield Fault(key="privacy.secure_aggregation", value=True, allowed=words)
        return
    if not privacy.secure_aggregation:
        words = (
            'expected true with privacy.mode = "distributed": single updates have only a share of '
            'the noise; or "local", where each has all of it'
        )
        yield Fault(key="privacy.secure_aggregation", value=False, allowed=words)
        return
    if not job.update.codec.startswith("grid:"):
        words = (
            'expected "grid:8,NORM" with privacy.mode = "distributed": noise goes on integers '
            "that are read as a sum, and votes are not"
        )
        yield Fault(key="update.codec", value=job.update.codec, allowed=words)
    if term_smoothing(described_merger(job.aggregation.merger)):
        words = (
            'expected "weighted-mean" with privacy.mode = "distributed": the weights that clients '
            "give themselves would be in the sum without noise"
        )
        yield Fault(key="aggregation.merger", value=job.aggregation.merger, allowed=words)
    asked = job.rounds.asked or job.data.clients
    traitors = math.floor(privacy.corrupt * asked)
    if privacy.min_survivors <= traitors:
        words = (
            f"expected more than {traitors} with {asked} clients in a round, of whom "
            f"privacy.corrupt = {privacy.corrupt:g} may help the server and tell it their noise; "
            "the more are sure to stay, the less noise each has to add"
        )
        yield Fault(key="privacy.min_survivors", value=privacy.min_survivors, allowed=words)
