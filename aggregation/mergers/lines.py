# SPDX-License-Identifier: Apache-2.0
"""The weighted mean, scaled layer by layer: early layers, which hold what is general, move less.

*Source* LiNeS: Wang et al., "LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances
Model Merging", 2024 (arXiv 2410.17146), and its authors' code (wang-kee/LiNeS): layer l of L is
scaled by λ = a + b·l/(L-1), tensors outside of layers by a.
*Differs from source* `first` is a and `last` is a + b. The source scales the update of one task
(with a + b = 1, as the defaults have it) or the merged update of several tasks, for which it takes
a from norms; here the mean of the clients, weighted as in `WeightedMean`, is scaled.

A tensor's layer is the first of the parts of its name, split at dots, that is an integer:
"vit.layers.3.attention.weight" is of layer 3; L is one more than the highest. Where there is but
one layer, it counts as the first.
*Cost* that of `WeightedMean`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from aggregation.gathered import require_some
from aggregation.mergers.merger import Merged
from aggregation.mergers.weighted_mean import MeanState, WeightedMean
from aggregation.settings import require_number
from aggregation.vectors import named, shaped
from protocol.tensors import NOTHING, ParamSpec, Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class LiNeS:
    """Streaming mean, scaled at the end."""

    name: ClassVar[str] = "lines"
    sum_only: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    order_independent: ClassVar[bool] = False

    first: float = 0.5  # of layer 0 and of tensors outside of layers, 0 or above
    last: float = 1.0  # of the last layer, 0 or above

    def __post_init__(self) -> None:
        for what, value in (("first", self.first), ("last", self.last)):
            require_number(what, value, "a finite number of 0 or above", lambda x: x >= 0)

    def init(
        self, spec: ParamSpec, *, current: Tensors = NOTHING, memory: Tensors = NOTHING
    ) -> MeanState:
        """Zero sums."""
        return WeightedMean().init(spec)

    def add(
        self, state: MeanState, update: Tensors, weight: float, *, client: str = ""
    ) -> MeanState:
        """One update more."""
        return WeightedMean().add(state, update, weight)

    def finish(self, state: MeanState) -> Merged:
        """The scaled mean."""
        require_some(self.name, state.count)
        mean = state.mean()
        layers = {name: layer_of(name) for name in state.spec.names}
        highest = max((layer for layer in layers.values() if layer is not None), default=0)
        for name, part in named(state.spec, mean):
            # outside of layers, in layer 0 and where there is but one
            depth = (layers[name] or 0) / highest if highest else 0.0
            part *= self.first + (self.last - self.first) * depth
        return Merged(delta=shaped(state.spec, mean))


def layer_of(name: str) -> int | None:
    """The first integer among the parts of a tensor's name, or None."""
    for part in name.split("."):
        if part.isascii() and part.isdigit():
            return int(part)
    return None
