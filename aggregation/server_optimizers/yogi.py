# SPDX-License-Identifier: Apache-2.0
"""FedYogi: FedAdam whose spread v shrinks no faster than it grows.

*Source* Reddi et al., "Adaptive Federated Optimization", ICLR 2021 (arXiv 2003.00295), algorithm 2:
m ← β₁m + (1-β₁)Δ, v ← v - (1-β₂)Δ²·sign(v - Δ²), x ← x + η·m / (√v + τ). After a large change v
falls by what later changes are, not by a share of itself, so that steps do not grow at once.

*Differs from source* in nothing: v starts at τ², and no moment is corrected. `initial` = 0 with
`bias_correction` divides both moments by 1-βᵗ, as is usual for Yogi outside of federations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from aggregation.server_optimizers.adaptive import (
    adaptive_step,
    first_spread,
    first_state,
    require_correctable,
    require_settings,
)
from aggregation.server_optimizers.server_optimizer import ServerState
from protocol.tensors import ParamSpec, Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class FedYogi:
    """Steps of about `learning_rate` a value and round, smaller for long after a large change."""

    name: ClassVar[str] = "yogi"

    learning_rate: float = 0.01  # η, above 0
    beta_1: float = 0.9  # from 0 to below 1
    beta_2: float = 0.99  # from 0 to below 1
    adaptivity: float = 1e-3  # τ, above 0: changes well below it are damped
    initial: float | None = None  # v before the first round, 0 or above; None: τ²
    bias_correction: bool = False  # divide moments by 1-βᵗ; only where v starts at 0

    def __post_init__(self) -> None:
        require_settings(
            learning_rate=self.learning_rate,
            adaptivity=self.adaptivity,
            initial=self._initial,
            betas={"beta_1": self.beta_1, "beta_2": self.beta_2},
        )
        require_correctable(self._initial, self.bias_correction)

    @property
    def _initial(self) -> float:
        return first_spread(self.initial, self.adaptivity, corrected=self.bias_correction)

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
            grow=self._grow,
            correct_first=self.bias_correction,
            correct_second=self.beta_2 if self.bias_correction else 0.0,
        )

    def _grow(self, second: np.ndarray, delta: np.ndarray) -> np.ndarray:
        square = delta**2
        return second - (1 - self.beta_2) * square * np.sign(second - square)
