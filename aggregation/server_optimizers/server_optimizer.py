# SPDX-License-Identifier: Apache-2.0
"""The protocol that every server optimizer follows: a merged change becomes the next tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from aggregation.errors import MergeError
from protocol.tensors import ParamSpec, Tensors


@dataclass(frozen=True, slots=True)
class ServerState:
    """What an optimizer remembers between rounds: named arrays, which a journal can keep."""

    spec: ParamSpec
    moments: Mapping[str, np.ndarray] = field(default_factory=dict)


class ServerOptimizer(Protocol):
    """`init` once a run, `step` once a round; a state is never changed, only replaced."""

    def init(self, spec: ParamSpec) -> ServerState:
        """The state before the first round."""
        ...

    def step(
        self, state: ServerState, tensors: Tensors, mean_delta: Tensors
    ) -> tuple[ServerState, dict[str, np.ndarray]]:
        """The next state and tensors, from the current ones and the merged change."""
        ...


def require_positive(what: str, value: object) -> None:
    """Raises: MergeError unless `value` is a finite number above 0."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and 0 < value < math.inf):  # type: ignore[operator]
        raise MergeError(f"{what}: expected a finite number above 0, found {value!r}")


def require_fit(spec: ParamSpec, tensors: Tensors, mean_delta: Tensors) -> None:
    """Raises: MergeError if either does not fit the spec."""
    for what, given in (("tensors", tensors), ("mean delta", mean_delta)):
        if problem := spec.mismatch(given):
            raise MergeError(f"cannot step, {what}: {problem}")


def stepped(
    spec: ParamSpec, tensors: Tensors, changes: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """tensors + changes (float64), rounded once to each tensor's own type.

    Raises: MergeError, naming the tensor, where the sum is not finite.
    """
    new: dict[str, np.ndarray] = {}
    for name, entry in spec.entries:
        with np.errstate(over="ignore", invalid="ignore"):  # refused by name, just below
            new[name] = np.asarray(tensors[name] + changes[name], entry.dtype)
        if not np.isfinite(new[name]).all():
            raise MergeError(
                f'tensor "{name}": expected a finite step, found NaN or infinity; '
                "lower the server learning rate"
            )
    return new
