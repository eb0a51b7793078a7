# SPDX-License-Identifier: Apache-2.0
"""`[privacy]` of a job file, and what the rest of a job must be where updates are private."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from aggregation.secure_aggregation import Terms
from aggregation.selection import described_merger, term_smoothing
from coordinator.errors import Fault, JobError
from coordinator.keys import check, key
from coordinator.toml_text import toml_value

if TYPE_CHECKING:
    from coordinator.job import Job


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacySection:
    """`[privacy]`"""

    mode: str = key(
        "none",
        "so that hardly anything depends on any one client, updates are clipped and noise is "
        "added: to their sum by the server (central), in shares by the clients of a secure sum "
        "(distributed), or by each client to its own update (local); see docs/privacy.md",
        choices=("none", "central", "distributed", "local"),
    )
    epsilon: float = key(
        0.0,
        "most that all rounds together may cost; the job ends before the round that would exceed "
        "it. 0: no limit, noise_multiplier alone decides",
        low=0,
        high=1000,
    )
    delta: float = key(
        1e-5,
        "chance that the guarantee allows itself; below one in the number of clients, better well",
        low=1e-10,  # loss distributions are cut off where less than 1e-15 is left of them
        below=1,
    )
    noise_multiplier: float = key(
        0.0,
        "noise on the sum of updates (local: on each update), in clipping norms; 0: the least "
        "with which all rounds cost at most epsilon",
        low=0,
        high=1_000_000,
    )
    clip: float = key(
        0.1,
        "l2 norm that an update is cut to, and that the noise is for; with clip_quantile that of "
        "the first round",
        above=0,
        high=1_000_000,
    )
    clip_quantile: float = key(
        0.0,
        "central: share of updates that the clipping norm is steered to leave as they are, at the "
        "cost of a noised count a round; 0: the norm stays",
        low=0,
        below=1,
    )
    clip_rate: float = key(
        0.2, "how fast clip_quantile moves the norm: its logarithm, a round", above=0, high=10
    )
    sampling: str = key(
        "poisson",
        "central: how a round's clients are drawn and accounted for: each by itself, "
        "rounds.clients_per_round of the population on average (poisson); exactly so many "
        "(without-replacement); or all",
        choices=("poisson", "without-replacement", "all"),
    )
    population: int = key(
        0,
        "central: clients that the drawing and the division of the sum count on, whoever is there; "
        "0: data.clients",
        low=0,
        high=10_000_000,
    )
    secure_aggregation: bool = key(
        False,
        "the server learns the sum of a round's updates and never a single one "
        "(see docs/privacy.md)",
    )
    min_survivors: int = key(
        3,
        "secure sums: clients below which no sum is opened; distributed: whose noise is enough",
        low=3,
        high=65_536,
    )
    corrupt: float = key(
        0.1, "secure sums: largest share of clients that may help the server", low=0, below=1
    )
    dropouts: float = key(
        0.3, "secure sums: largest share of clients that may be lost on the way", low=0, below=1
    )

    def __post_init__(self) -> None:
        check(self, "privacy")
        faults = []
        if self.mode != "none" and not self.epsilon and not self.noise_multiplier:
            allowed = (
                "expected a budget above 0, or privacy.noise_multiplier above 0: without either "
                "there is no noise to add"
            )
            faults.append(Fault(key="privacy.epsilon", value=self.epsilon, allowed=allowed))
        if self.mode == "none" and (self.epsilon or self.noise_multiplier or self.clip_quantile):
            allowed = (
                'expected "central", "distributed" or "local", or epsilon, noise_multiplier and '
                "clip_quantile 0"
            )
            faults.append(Fault(key="privacy.mode", value=self.mode, allowed=allowed))
        if faults:
            raise JobError(faults)

    @property
    def terms(self) -> Terms | None:
        """Of secure sums; None where updates are seen one by one."""
        if not self.secure_aggregation:
            return None
        return Terms(corrupt=self.corrupt, dropouts=self.dropouts, min_survivors=self.min_survivors)

    @property
    def is_private(self) -> bool:
        """Whether the job promises anything."""
        return self.mode != "none"

    @property
    def is_central(self) -> bool:
        """Whether the server adds the noise."""
        return self.mode == "central"

    @property
    def is_told_little(self) -> bool:
        """Whether nothing of a single client is told but what the job names."""
        return self.secure_aggregation or self.mode == "local"


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
