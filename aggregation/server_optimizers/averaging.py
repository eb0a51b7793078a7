# SPDX-License-Identifier: Apache-2.0
"""x ← x + η·Δ: federated averaging when η = 1.

*Source* Reddi et al., "Adaptive Federated Optimization", ICLR 2021 (arXiv 2003.00295), algorithm 1
with SGD as the server's optimizer. Computed in float64, rounded once to each tensor's dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from aggregation.errors import MergeError
from protocol.tensors import ParamSpec, Tensors


@dataclass(frozen=True, slots=True)
class AveragingState:
    """Averaging remembers the spec alone."""

    spec: ParamSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Averaging:
    """Adds the merged change, scaled."""

    learning_rate: float = 1.0  # η, above 0

    def __post_init__(self) -> None:
        rate: object = self.learning_rate
        is_number = isinstance(rate, int | float) and not isinstance(rate, bool)
        if not (is_number and 0 < self.learning_rate < math.inf):
            raise MergeError(
                f"server learning rate: expected a finite number above 0, found {rate!r}"
            )

    def init(self, spec: ParamSpec) -> AveragingState:
        """Nothing to remember but what fits."""
        return AveragingState(spec)

    def step(
        self, state: AveragingState, tensors: Tensors, mean_delta: Tensors
    ) -> tuple[AveragingState, dict[str, np.ndarray]]:
        """Raises: MergeError if either argument does not fit the spec, or the sum is not finite."""
        for what, given in (("tensors", tensors), ("mean delta", mean_delta)):
            if problem := state.spec.mismatch(given):
                raise MergeError(f"cannot step, {what}: {problem}")
        stepped: dict[str, np.ndarray] = {}
        for name, entry in state.spec.entries:
            with np.errstate(over="ignore", invalid="ignore"):  # refused by name, just below
                change = np.multiply(mean_delta[name], self.learning_rate, dtype=np.float64)
                new = np.asarray(tensors[name] + change, entry.dtype)
            if not np.isfinite(new).all():
                raise MergeError(
                    f'tensor "{name}": expected a finite step, found NaN or infinity; '
                    "lower the server learning rate"
                )
            stepped[name] = new
        return state, stepped
