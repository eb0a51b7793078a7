# SPDX-License-Identifier: Apache-2.0
"""FedAdam: the merged change is a pseudo-gradient for Adam on the server.

*Source* Reddi et al., "Adaptive Federated Optimization", ICLR 2021 (arXiv 2003.00295), algorithm 2:
m ← β₁m + (1-β₁)Δ, v ← β₂v + (1-β₂)Δ², x ← x + η·m / (√v + τ).

*Differs from source* Moments start at 0 and are divided by 1-βᵗ, as in Adam itself, so that the
first rounds have full-sized steps; the paper starts v at τ² or above and corrects nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aggregation.errors import MergeError
from aggregation.server_optimizers.server_optimizer import (
    ServerState,
    require_fit,
    require_positive,
    stepped,
)
from protocol.tensors import ParamSpec, Tensors

_STEPS = "steps"


@dataclass(frozen=True, slots=True, kw_only=True)
class FedAdam:
    """Steps of about `learning_rate` a value and round, whatever the size of the changes."""

    learning_rate: float = 0.01  # η, above 0
    beta_1: float = 0.9  # from 0 to below 1
    beta_2: float = 0.99  # from 0 to below 1
    adaptivity: float = 1e-3  # τ, above 0: changes well below it are damped

    def __post_init__(self) -> None:
        require_positive("server learning rate", self.learning_rate)
        require_positive("server adaptivity", self.adaptivity)
        for name, beta in (("beta_1", self.beta_1), ("beta_2", self.beta_2)):
            if not 0 <= beta < 1:
                raise MergeError(f"{name}: expected from 0 to below 1, found {beta!r}")

    def init(self, spec: ParamSpec) -> ServerState:
        """Two moments a value, float64, and the number of steps."""
        moments: dict[str, np.ndarray] = {_STEPS: np.zeros(())}
        for name, entry in spec.entries:
            moments[f"first/{name}"] = np.zeros(entry.shape)
            moments[f"second/{name}"] = np.zeros(entry.shape)
        return ServerState(spec, moments)

    def step(
        self, state: ServerState, tensors: Tensors, mean_delta: Tensors
    ) -> tuple[ServerState, dict[str, np.ndarray]]:
        """Raises: MergeError if either argument does not fit the spec, or the sum is not finite."""
        require_fit(state.spec, tensors, mean_delta)
        steps = state.moments[_STEPS] + 1.0
        moments: dict[str, np.ndarray] = {_STEPS: np.asarray(steps)}
        changes: dict[str, np.ndarray] = {}
        for name in state.spec.names:
            delta = mean_delta[name].astype(np.float64)
            first = self.beta_1 * state.moments[f"first/{name}"] + (1 - self.beta_1) * delta
            second = self.beta_2 * state.moments[f"second/{name}"] + (1 - self.beta_2) * delta**2
            moments[f"first/{name}"], moments[f"second/{name}"] = first, second
            mean = first / (1 - self.beta_1**steps)
            spread = np.sqrt(second / (1 - self.beta_2**steps))
            changes[name] = self.learning_rate * mean / (spread + self.adaptivity)
        return ServerState(state.spec, moments), stepped(state.spec, tensors, changes)
