# SPDX-License-Identifier: Apache-2.0
"""`[privacy]` of a job file, and what the rest of a job must be where updates are private."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aggregation.secure_aggregation import Terms
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
        "central: updates are clipped, and the server adds noise to their sum, so that the result "
        "hardly depends on any one client (see docs/privacy.md)",
        choices=("none", "central"),
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
        "noise on the sum of updates, in clipping norms; 0: the least with which all rounds cost "
        "at most epsilon",
        low=0,
        high=1_000_000,
    )
    clip: float = key(
        0.1,
        "l2 norm that an update is cut to; with clip_quantile that of the first round",
        above=0,
        high=1_000_000,
    )
    clip_quantile: float = key(
        0.0,
        "share of updates that the clipping norm is steered to leave as they are, at the cost of a "
        "noised count a round; 0: the norm stays",
        low=0,
        below=1,
    )
    clip_rate: float = key(
        0.2, "how fast clip_quantile moves the norm: its logarithm, a round", above=0, high=10
    )
    sampling: str = key(
        "poisson",
        "how a round's clients are drawn and accounted for: each by itself, "
        "rounds.clients_per_round of the population on average (poisson); exactly so many "
        "(without-replacement); or all",
        choices=("poisson", "without-replacement", "all"),
    )
    population: int = key(
        0,
        "clients that the drawing and the division of the sum count on, whoever is there; "
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
        3, "secure sums: clients below which no sum is opened", low=3, high=65_536
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
            allowed = 'expected "central", or epsilon, noise_multiplier and clip_quantile 0'
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


def privacy_faults(job: Job) -> list[Fault]:
    """What a private job does not go with; none where the job is not private."""
    if not job.privacy.is_private:
        return []
    return [*_sampling_faults(job), *_setting_faults(job)]


def _sampling_faults(job: Job) -> Iterator[Fault]:
    privacy, drawn = job.privacy, job.rounds.clients_per_round
    population = privacy.population or job.data.clients
    if privacy.delta * population >= 1:
        words = (
            f"expected less than 1/{population}, one in the number of clients: delta is a chance "
            "that nothing is promised about, and would cover publishing one of them whole"
        )
        yield Fault(key="privacy.delta", value=privacy.delta, allowed=words)
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


def _setting_faults(job: Job) -> Iterator[Fault]:
    """Keys that must have one value, each with the reason."""
    rounds, update, aggregation = job.rounds, job.update, job.aggregation
    wanted: dict[str, tuple[object, object, str]] = {
        "rounds.mode": (
            rounds.mode, "sync",
            "whose update a step takes depends on who is quick, which no accounting covers",
        ),
        "rounds.quorum": (
            rounds.quorum, 0,
            "who is among the first depends on more than the drawing that is accounted for; "
            "rounds.deadline_s ends a round by the clock",
        ),
        "rounds.over_selection": (
            rounds.over_selection, 1.0,
            "who is among the first depends on more than the drawing that is accounted for",
        ),
        "rounds.min_updates": (
            rounds.min_updates, 1,
            "a round is released however few updates came: whether it is would tell their number",
        ),
        "aggregation.weighting": (
            aggregation.weighting, "uniform",
            "an update weighted by its samples could be larger than the noise hides",
        ),
        "aggregation.merger": (
            aggregation.merger, "weighted-mean",
            "noise hides a client in a sum; other rules give one client more influence than that "
            '(LoRA: aggregation.factors = "up" averages B alone)',
        ),
        "update.metrics": (
            update.metrics, "",
            "what clients tell of their training leaves them without noise",
        ),
        "update.error_feedback": (
            update.error_feedback, False,
            "what a codec left behind makes updates longer than the clipping norm",
        ),
        "data.held_out": (
            job.data.held_out, 0.0,
            "tests on clients' held-out samples would be told without noise",
        ),
        "personal.report": (
            job.personal.report, False,
            "tests on clients' held-out samples would be told without noise",
        ),
        "training.scaffold": (
            job.training.scaffold, False,
            "a control variate is a second release of every client, which nothing accounts for",
        ),
    }  # fmt: skip
    for name, (found, value, why) in wanted.items():
        if found != value:
            words = f'expected {toml_value(value)} with privacy.mode = "{job.privacy.mode}": {why}'
            yield Fault(key=name, value=found, allowed=words)
    if job.is_split:
        words = (
            f'expected another method with privacy.mode = "{job.privacy.mode}": hidden states '
            "leave the device beside its update, and no noise covers them"
        )
        yield Fault(key="method.name", value=job.method.name, allowed=words)
