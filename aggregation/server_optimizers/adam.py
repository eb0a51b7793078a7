# SPDX-License-Identifier: Apache-2.0
"""FedAdam: the merged change is a pseudo-gradient for Adam on the server.

*Source* Reddi et al., "Adaptive Federated Optimization", ICLR 2021 (arXiv 2003.00295), algorithm 2:
m ← β₁m + (1-β₁)Δ, v ← β₂v + (1-β₂)Δ², x ← x + η·m / (√v + τ).

*Differs from source* Moments start at 0 and are divided by 1-βᵗ, as in Adam itself, so that the
first rounds have full-sized steps; the paper starts v at τ² or above and corrects nothing, which
`initial` = τ² and `bias_correction` = false do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from aggregation.server_optimizers.adaptive import (
    adaptive_step,
    first_state,
    require_correctable,
    require_settings,
)
from aggregation.server_optimizers.server_optimizer import ServerState
from protocol.tensors import ParamSpec, Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class FedAdam:
    """Steps of about `learning_rate` a value and round, whatever the size of the changes."""

    name: ClassVar[str] = "adam"

    learning_rate: float = 0.01  # η, above 0
    beta_1: float = 0.9  # from 0 to below 1
    beta_2: float = 0.99  # from 0 to below 1
    adaptivity: float = 1e-3  # τ, above 0: changes well below it are damped
    initial: float = 0.0  # v before the first round, 0 or above
    bias_correction: bool = True  # divide moments by 1-βᵗ; only where v starts at 0

    def __post_init__(self) -> None:
        require_settings(
            learning_rate=self.learning_rate,
            adaptivity=self.adaptivity,
            initial=self.initial,
            betas={"beta_1": self.beta_1, "beta_2": self.beta_2},
        )
        require_correctable(self.initial, self.bias_correction)

    def init(self, spec: ParamSpec) -> ServerState:
        """Two moments a value, float64, and the number of steps."""
        return first_state(spec, self.initial)

    def step(
        self, state: ServerState, tensors: Tensors, mean_delta: Tensors
    ) -> tuple[ServerState, dict[str, np.ndarray]]:
        """Raises: MergeError if either argument does not fit the spec, or the sum is not finite."""
        return adaptive_step(
            state,
            tensors,
            mean_delta,
            learning_rate=self.learning_rate,
            adaptivity=self.adaptivity,
            beta_1=self.beta_1,
            grow=self._grow,
            correct_first=self.bias_correction,
            correct_second=self.beta_2 if self.bias_correction else 0.0,
        )

    def _grow(self, second: np.ndarray, delta: np.ndarray) -> np.ndarray:
        return self.beta_2 * second + (1 - self.beta_2) * delta**2
