# SPDX-License-Identifier: Apache-2.0
"""The protocol that every server optimizer follows: a merged change becomes the next tensors."""

from __future__ import annotations

from typing import Protocol, TypeVar

import numpy as np

from protocol.tensors import ParamSpec, Tensors

State = TypeVar("State")


class ServerOptimizer(Protocol[State]):
    """`init` once a run, `step` once a round; a state is never changed, only replaced."""

    def init(self, spec: ParamSpec) -> State:
        """The state before the first round."""
        ...

    def step(
        self, state: State, tensors: Tensors, mean_delta: Tensors
    ) -> tuple[State, dict[str, np.ndarray]]:
        """The next state and tensors, from the current ones and the merged change."""
        ...
