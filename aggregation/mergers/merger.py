# SPDX-License-Identifier: Apache-2.0
"""The protocol that every merger follows: many clients' tensors become one set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np

from protocol.tensors import NOTHING, ParamSpec, Tensors

State = TypeVar("State")


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseChange:
    """A change of one frozen weight [d, k]: left @ right, or `left` alone where that is smaller.

    Changes add up over rounds: whoever joins late needs the sum of all of them. A change belongs to
    the delta that it comes with, and is right only if that is applied in full: by a server
    optimizer that averages at rate 1.
    """

    left: np.ndarray  # float32 [d, q]; [d, k] without `right`
    right: np.ndarray | None  # float32 [q, k]

    def product(self) -> np.ndarray:
        """The change itself, float32 [d, k], a new array."""
        if self.right is None:
            return self.left.copy()
        product: np.ndarray = self.left.astype(np.float64) @ self.right
        return product.astype(np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of what has to be sent."""
        return self.left.nbytes + (0 if self.right is None else self.right.nbytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """What a round's updates come to."""

    delta: Mapping[str, np.ndarray]
    """The change to the current tensors, in the spec's names, shapes and dtypes."""
    memory: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Named arrays that the next round's `init` is given, and that a journal can keep."""
    base: Mapping[str, BaseChange] = field(default_factory=dict)
    """Changes of frozen weights, by the layer's `down` factor; few mergers have any."""
    notes: tuple[str, ...] = ()
    """What a report should say of this merge, such as what a truncation lost."""


class Merger(Protocol[State]):
    """`init`, then `add` once an update, then `finish`; a state is never changed, only replaced.

    An update is a change: trained tensors less the current ones, which all clients were sent. Its
    arrays may be kept until `finish`: they are not to be written to in between.
    """

    @property
    def sum_only(self) -> bool:
        """The result depends on weighted sums alone, so updates may be summed under a mask."""
        ...

    @property
    def exact(self) -> bool:
        """The model that results is the weighted mean of the clients' models up to rounding, in the
        weights that their tensors stand for (a product of two, for LoRA), not an estimate of it."""
        ...

    @property
    def order_independent(self) -> bool:
        """Any order of the same updates gives the same bits."""
        ...

    def init(
        self, spec: ParamSpec, *, current: Tensors = NOTHING, memory: Tensors = NOTHING
    ) -> State:
        """Nothing added yet. `current`: the tensors that the round's updates start from; `memory`:
        what the last round's `finish` left. Raises: MergeError for what cannot be merged."""
        ...

    def add(self, state: State, update: Tensors, weight: float, *, client: str = "") -> State:
        """The state with one update more. Raises: MergeError; the old state is as it was."""
        ...

    def finish(self, state: State) -> Merged:
        """Raises: MergeError if nothing was added."""
        ...
