# SPDX-License-Identifier: Apache-2.0
"""The protocol that every merger follows: many clients' tensors become one set."""

from __future__ import annotations

from typing import Protocol, TypeVar

import numpy as np

from protocol.tensors import ParamSpec, Tensors

State = TypeVar("State")


class Merger(Protocol[State]):
    """`init`, then `add` once an update, then `finish`; a state is never changed, only replaced."""

    @property
    def sum_only(self) -> bool:
        """The result depends on weighted sums alone, so updates may be summed under a mask."""
        ...

    @property
    def exact(self) -> bool:
        """The result is the weighted mean of the updates up to rounding, not an estimate of it."""
        ...

    @property
    def order_independent(self) -> bool:
        """Any order of the same updates gives the same bits."""
        ...

    def init(self, spec: ParamSpec) -> State:
        """Nothing added yet. Raises: MergeError for a spec that cannot be merged."""
        ...

    def add(self, state: State, tensors: Tensors, weight: float) -> State:
        """The state with one update more. Raises: MergeError; the old state is as it was."""
        ...

    def finish(self, state: State) -> dict[str, np.ndarray]:
        """The merged tensors. Raises: MergeError if nothing was added."""
        ...
