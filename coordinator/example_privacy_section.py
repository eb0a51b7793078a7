# SPDX-License-Identifier: Apache-2.0
"""`[example_privacy]` of a job file; `example_privacy_rules.py` has what goes with it.

What is promised is about one sample of one client, present or absent, towards whoever sees what
clients send: see docs/dp-sgd.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.errors import Fault, JobError
from coordinator.keys import check, key


@dataclass(frozen=True, slots=True, kw_only=True)
class ExamplePrivacySection:
    """`[example_privacy]`: DP-SGD on every client."""

    noise_multiplier: float = key(
        0.0,
        "noise on the sum of a step's gradients, in clipping norms, drawn on the device; 0: off "
        "(see docs/dp-sgd.md)",
        low=0,
        high=1_000,
    )
    clip: float = key(
        1.0, "l2 norm that the gradient of one sample is cut to", above=0, high=1_000_000
    )
    delta: float = key(
        1e-5,
        "chance that the guarantee allows itself; below one in the samples of the smallest client",
        low=1e-10,  # loss distributions are cut off where less than 1e-15 is left of them
        below=1,
    )
    max_epsilon: float = key(
        0.0, "most that all rounds may cost a sample, or the job is refused; 0: no limit", low=0
    )

    def __post_init__(self) -> None:
        check(self, "example_privacy")
        if self.max_epsilon and not self.noise_multiplier:
            allowed = "expected 0, or example_privacy.noise_multiplier above 0: there is no noise"
            value = self.max_epsilon
            raise JobError([Fault(key="example_privacy.max_epsilon", value=value, allowed=allowed)])

    @property
    def is_private(self) -> bool:
        """Whether the job promises anything."""
        return self.noise_multiplier > 0
