# SPDX-License-Identifier: Apache-2.0
"""A scaled sum of updates without their outliers and without their small values.

In each row (along the last dimension) of each tensor of an update the share γ of largest magnitude
is dropped, of the rest the share β of largest magnitude is kept, everything else is dropped; then
the updates are summed and scaled by α.

*Source* Davari, Belilovsky, "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse
Masks", 2023 (arXiv 2312.06795), and its authors' code (rezazzr/breadcrumbs), which counts both
shares of the whole row, rounded down, and leaves scalars as they are.
*Differs from source* one value of a row at least is kept: rounded down, no value of a row of fewer
than 1/β (as of LoRA's B, whose rows are as long as its rank) ever would be. Of equal magnitudes
those that come first count as larger. Weights as in `TaskArithmetic`, which this is for the rest:
for equal weights the sum is the source's.
*Cost* time n log n in a row's length; memory four float64 copies of the tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from aggregation.gathered import checked_row, require_some
from aggregation.mergers.merger import Merged
from aggregation.mergers.task_arithmetic import TaskArithmetic
from aggregation.mergers.weighted_mean import MeanState
from aggregation.settings import require_number
from protocol.tensors import NOTHING, ParamSpec, Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Breadcrumbs:
    """Streaming sum of masked updates."""

    name: ClassVar[str] = "breadcrumbs"
    sum_only: ClassVar[bool] = False  # the sums are of masked updates: someone must see each one
    exact: ClassVar[bool] = False
    order_independent: ClassVar[bool] = False

    scaling: float = 0.2  # α, above 0
    kept: float = 0.15  # β, of a row, above 0 and at most 1
    outliers: float = 0.006  # γ, of a row, from 0 to below 1

    def __post_init__(self) -> None:
        require_number("scaling", self.scaling, "a finite number above 0", lambda x: x > 0)
        require_number("kept", self.kept, "above 0 and at most 1", lambda x: 0 < x <= 1)
        require_number("outliers", self.outliers, "from 0 to below 1", lambda x: 0 <= x < 1)

    def init(
        self, spec: ParamSpec, *, current: Tensors = NOTHING, memory: Tensors = NOTHING
    ) -> MeanState:
        """Zero sums."""
        return self._sum.init(spec)

    def add(
        self, state: MeanState, update: Tensors, weight: float, *, client: str = ""
    ) -> MeanState:
        """One update more."""
        checked_row(state.spec, update)
        masked = {name: self._masked(update[name]) for name in state.spec.names}
        return self._sum.add(state, masked, weight)

    def finish(self, state: MeanState) -> Merged:
        """The scaled sum. Raises: MergeError where it is beyond the tensors' types."""
        require_some(self.name, state.count)
        return self._sum.finish(state)

    @property
    def _sum(self) -> TaskArithmetic:
        return TaskArithmetic(scaling=self.scaling)

    def _masked(self, values: np.ndarray) -> np.ndarray:
        if values.ndim == 0:
            return values
        length = values.shape[-1]
        # 0.29 · 100 is 28.999… in floats
        dropped = min(int(self.outliers * length + 1e-9), length - 1)
        kept = max(1, int(self.kept * length + 1e-9))
        order = np.argsort(-np.abs(values), axis=-1, kind="stable")[..., dropped : dropped + kept]
        masked = np.zeros_like(values)
        np.put_along_axis(masked, order, np.take_along_axis(values, order, axis=-1), axis=-1)
        return masked
