# SPDX-License-Identifier: Apache-2.0
"""`[privacy]` of a job file; `privacy_rules.py` has what goes with it."""

from __future__ import annotations

from dataclasses import dataclass

from aggregation.secure_aggregation import Terms
from coordinator.errors import Fault, JobError
from coordinator.keys import check, key


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
