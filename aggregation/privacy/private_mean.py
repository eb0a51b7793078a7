# SPDX-License-Identifier: Apache-2.0
"""The mean of clipped updates with noise on it, as a merger: see `gaussian.py` for the formula.

Updates are clipped again as they come, whatever clients and codecs did to them, and are summed as
integers, so that their order does not matter to the last bit. Without any update the result is the
noise alone: whether anybody came is nobody's to know.

The noise is keyed by the round's seed and by a digest of the sum. The same sum gets the same noise,
however often a round is played; another sum (a client less, after a crash) gets noise that has
nothing to do with the first, so that no two releases of a round differ by a client's update alone.

*Cost* time linear in each update; memory one int64 copy of the shared tensors, however many
clients.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from aggregation.errors import MergeError
from aggregation.mergers.merger import Merged
from aggregation.privacy.clipping import clip
from aggregation.privacy.gaussian import Noise, in_steps, noised_mean
from aggregation.vectors import checked_weight, require_floats, shaped
from protocol.tensors import NOTHING, ParamSpec, Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateSum:
    """What has been added."""

    spec: ParamSpec  # of whole updates
    steps: np.ndarray  # int64 [size of the shared tensors]
    count: int

    def digest(self) -> str:
        """Of all that a release of it depends on; secret, as the sum is."""
        return hashlib.sha256(self.steps.astype("<i8").tobytes()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateMean:
    """One round's: the next has a seed of its own."""

    name: ClassVar[str] = "private-mean"
    sum_only: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    order_independent: ClassVar[bool] = True

    noise: Noise
    expected: float  # m, clients to divide by
    shared: ParamSpec  # tensors that clients trained; the others of an update are 0, without noise
    seed: bytes = field(repr=False)

    def init(
        self, spec: ParamSpec, *, current: Tensors = NOTHING, memory: Tensors = NOTHING
    ) -> PrivateSum:
        """Zero sums."""
        require_floats(spec)
        return PrivateSum(spec=spec, steps=np.zeros(self.shared.size, np.int64), count=0)

    def add(
        self, state: PrivateSum, update: Tensors, weight: float, *, client: str = ""
    ) -> PrivateSum:
        """One update more; `weight` is checked and does not count: all count alike.

        Raises: MergeError for one that does not fit; PrivacyError for one that is not finite.
        """
        checked_weight(weight)
        if problem := state.spec.mismatch(update):
            raise MergeError(f"cannot merge: {problem}")
        if state.count >= self.noise.most:
            raise MergeError(f"expected at most {self.noise.most} updates in a private sum")
        own = {name: update[name] for name in self.shared.names}
        steps = in_steps(self.shared, clip(own, self.noise.clip).delta, self.noise.step)
        return PrivateSum(spec=state.spec, steps=state.steps + steps, count=state.count + 1)

    def finish(self, state: PrivateSum) -> Merged:
        """The noised mean, in the dtypes of the spec."""
        mean = noised_mean(
            state.steps,
            self.noise,
            expected=self.expected,
            seed=self.seed,
            use=f"update/{state.digest()}",
        )
        still = {
            name: np.zeros(entry.shape, entry.dtype)
            for name, entry in state.spec.entries
            if name not in self.shared
        }
        return Merged(delta={**still, **shaped(self.shared, mean)})
