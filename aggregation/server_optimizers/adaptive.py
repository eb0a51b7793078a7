# SPDX-License-Identifier: Apache-2.0
"""What FedAdam, FedYogi and FedAdagrad share: x ← x + η·m / (√v + τ), m ← β₁m + (1-β₁)Δ.

*Source* Reddi et al., "Adaptive Federated Optimization", ICLR 2021 (arXiv 2003.00295), algorithm 2.
The three differ in how Δ² enters v, and each has its own file for that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from aggregation.errors import MergeError
from aggregation.server_optimizers.server_optimizer import (
    ServerState,
    require_fit,
    require_positive,
    stepped,
)
from aggregation.settings import require_number
from protocol.tensors import ParamSpec, Tensors

Grow = Callable[[np.ndarray, np.ndarray], np.ndarray]  # v and Δ (float64) to the next v

_STEPS: Final = "steps"


def require_settings(
    *, learning_rate: float, adaptivity: float, initial: float, betas: Mapping[str, float]
) -> None:
    """Raises: MergeError, naming the setting that is outside its range."""
    require_positive("server learning rate", learning_rate)
    require_positive("server adaptivity", adaptivity)
    require_number("initial", initial, "a finite number of 0 or above", lambda x: x >= 0)
    for name, beta in betas.items():
        require_number(name, beta, "from 0 to below 1", lambda x: 0 <= x < 1)


def require_correctable(initial: float, bias_correction: bool) -> None:
    """Raises: MergeError where v starts above 0, and would be corrected as if at 0."""
    if bias_correction and initial > 0:
        raise MergeError(
            f"initial: expected 0 with bias correction, which assumes it, found {initial!r}; "
            "choose one of the two"
        )


def first_spread(initial: float | None, adaptivity: float, *, corrected: bool) -> float:
    """v before the first round: as given, else τ² as in the source, or 0 if it is corrected."""
    if initial is not None:
        return initial
    return 0.0 if corrected else adaptivity**2


def first_state(spec: ParamSpec, initial: float) -> ServerState:
    """m = 0 and v = `initial`, float64, a value each, and no step yet."""
    moments: dict[str, np.ndarray] = {_STEPS: np.zeros(())}
    for name, entry in spec.entries:
        moments[f"first/{name}"] = np.zeros(entry.shape)
        moments[f"second/{name}"] = np.full(entry.shape, float(initial))
    return ServerState(spec, moments)


def adaptive_step(
    state: ServerState,
    tensors: Tensors,
    mean_delta: Tensors,
    *,
    learning_rate: float,
    adaptivity: float,
    beta_1: float,
    grow: Grow,
    correct_first: bool,
    correct_second: float = 0.0,
) -> tuple[ServerState, dict[str, np.ndarray]]:
    """The next state and tensors. After t steps m is divided by 1-β₁ᵗ if `correct_first`, and v by
    1-`correct_second`ᵗ (0: as it is).

    Raises: MergeError if either argument does not fit the spec, or a result is not finite.
    """
    require_fit(state.spec, tensors, mean_delta)
    steps = state.moments[_STEPS] + 1.0
    moments: dict[str, np.ndarray] = {_STEPS: np.asarray(steps)}
    changes: dict[str, np.ndarray] = {}
    for name in state.spec.names:
        delta = mean_delta[name].astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):  # refused by name, just below
            first = beta_1 * state.moments[f"first/{name}"] + (1 - beta_1) * delta
            second = grow(state.moments[f"second/{name}"], delta)
        if not np.isfinite(second).all():
            raise MergeError(
                f'tensor "{name}": expected a mean change with finite squares, found NaN, infinity '
                "or values too large"
            )
        moments[f"first/{name}"] = np.asarray(first)
        moments[f"second/{name}"] = np.asarray(second)
        mean = first / (1 - beta_1**steps) if correct_first else first
        spread = np.sqrt(second / (1 - correct_second**steps) if correct_second else second)
        changes[name] = np.asarray(learning_rate * mean / (spread + adaptivity))
    return ServerState(state.spec, moments), stepped(state.spec, tensors, changes)
