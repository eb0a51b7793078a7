# SPDX-License-Identifier: Apache-2.0
"""FedAvgM: averaging with momentum on the server, v ← βv + Δ, x ← x + η·v.

*Source* Hsu, Qi, Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated
Visual Classification", 2019 (arXiv 1909.06335).

A change that stays the same comes to 1/(1-β) times itself: with β = 0.9, η = 0.1 steps as far as
plain averaging does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from aggregation.server_optimizers.server_optimizer import (
    ServerState,
    require_fit,
    require_positive,
    stepped,
)
from aggregation.settings import require_number
from protocol.tensors import ParamSpec, Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class FedAvgM:
    """Adds a decaying sum of the merged changes, scaled."""

    name: ClassVar[str] = "momentum"

    learning_rate: float = 1.0  # η, above 0
    momentum: float = 0.9  # β, from 0 (plain averaging) to below 1

    def __post_init__(self) -> None:
        require_positive("server learning rate", self.learning_rate)
        require_number("momentum", self.momentum, "from 0 to below 1", lambda x: 0 <= x < 1)

    def init(self, spec: ParamSpec) -> ServerState:
        """One sum a value, float64."""
        return ServerState(spec, {f"sum/{name}": np.zeros(e.shape) for name, e in spec.entries})

    def step(
        self, state: ServerState, tensors: Tensors, mean_delta: Tensors
    ) -> tuple[ServerState, dict[str, np.ndarray]]:
        """Raises: MergeError if either argument does not fit the spec, or the sum is not finite."""
        require_fit(state.spec, tensors, mean_delta)
        moments: dict[str, np.ndarray] = {}
        changes: dict[str, np.ndarray] = {}
        with np.errstate(over="ignore", invalid="ignore"):  # refused by name, in `stepped`
            for name in state.spec.names:
                sums = self.momentum * state.moments[f"sum/{name}"] + mean_delta[name]
                moments[f"sum/{name}"] = np.asarray(sums)
                changes[name] = np.asarray(self.learning_rate * sums)
        return ServerState(state.spec, moments), stepped(state.spec, tensors, changes)
