# SPDX-License-Identifier: Apache-2.0
"""FedAdagrad: steps shrink with all the changes that there were.

*Source* Reddi et al., "Adaptive Federated Optimization", ICLR 2021 (arXiv 2003.00295), algorithm 2:
m ← β₁m + (1-β₁)Δ, v ← v + Δ², x ← x + η·m / (√v + τ).

*Differs from source* in nothing: v starts at τ², and no moment is corrected. `bias_correction`
divides m by 1-β₁ᵗ; v is a sum, in which there is no bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from aggregation.server_optimizers.adaptive import (
    adaptive_step,
    first_spread,
    first_state,
    require_settings,
)
from aggregation.server_optimizers.server_optimizer import ServerState
from protocol.tensors import ParamSpec, Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class FedAdagrad:
    """Steps of about `learning_rate` a value in the first round, later over √rounds."""

    name: ClassVar[str] = "adagrad"

    learning_rate: float = 0.01  # η, above 0
    beta_1: float = 0.0  # from 0 to below 1
    adaptivity: float = 1e-3  # τ, above 0: changes well below it are damped
    initial: float | None = None  # v before the first round, 0 or above; None: τ²
    bias_correction: bool = False  # divide m by 1-β₁ᵗ

    def __post_init__(self) -> None:
        require_settings(
            learning_rate=self.learning_rate,
            adaptivity=self.adaptivity,
            initial=self._initial,
            betas={"beta_1": self.beta_1},
        )

    @property
    def _initial(self) -> float:
        return first_spread(self.initial, self.adaptivity, corrected=False)

    def init(self, spec: ParamSpec) -> ServerState:
        """Two moments a value, float64, and the number of steps."""
        return first_state(spec, self._initial)

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
            grow=_grow,
            correct_first=self.bias_correction,
        )


def _grow(second: np.ndarray, delta: np.ndarray) -> np.ndarray:
    return second + delta**2
