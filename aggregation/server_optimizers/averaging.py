# SPDX-License-Identifier: Apache-2.0
"""x ← x + η·Δ: federated averaging when η = 1.

*Source* Reddi et al., "Adaptive Federated Optimization", ICLR 2021 (arXiv 2003.00295), algorithm 1
with SGD as the server's optimizer. Computed in float64, rounded once to each tensor's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aggregation.server_optimizers.server_optimizer import (
    ServerState,
    require_fit,
    require_positive,
    stepped,
)
from protocol.tensors import ParamSpec, Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Averaging:
    """Adds the merged change, scaled."""

    learning_rate: float = 1.0  # η, above 0

    def __post_init__(self) -> None:
        require_positive("server learning rate", self.learning_rate)

    def init(self, spec: ParamSpec) -> ServerState:
        """Nothing to remember."""
        return ServerState(spec)

    def step(
        self, state: ServerState, tensors: Tensors, mean_delta: Tensors
    ) -> tuple[ServerState, dict[str, np.ndarray]]:
        """Raises: MergeError if either argument does not fit the spec, or the sum is not finite."""
        require_fit(state.spec, tensors, mean_delta)
        with np.errstate(over="ignore"):
            changes = {
                name: np.multiply(mean_delta[name], self.learning_rate, dtype=np.float64)
                for name in state.spec.names
            }
        return state, stepped(state.spec, tensors, changes)
