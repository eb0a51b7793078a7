# SPDX-License-Identifier: Apache-2.0
"""Updates merged one after another, each freed of what the merged one already holds.

Of a new update's matrix Δ, seen in the singular vectors of the sum so far, S = UΣVᵀ, what lies
along uᵢvⱼᵀ is dropped where i and j are both among the first r, and where i = j; the rest is added
to S. r is the number of directions that come before the singular values' sum exceeds the share α
of their total. The merged update is S scaled to the mean of the norms of all updates until then.

*Source* OPCM: Tang et al., "Merging Models on the Fly Without Retraining: A Sequential Approach to
Scalable Continual Model Merging", 2025 (arXiv 2501.09522). Checked against its author's code
(tanganke/fusion_bench, `method/opcm/opcm.py`): the projection, α's meaning, the norms being those
of all tensors together, the plain sum for what is no matrix. Not checked against the paper itself,
which was not at hand; the default of α is from memory.
*Differs from source* S is kept unscaled and scaled at the end, which is the same. Directions whose
singular value is rounding are not used: the code takes a full basis, so that where S has lower rank
than its shape allows, what is dropped along i = j depends on which basis the library happens to
give. α = 1 is refused; the code treats it as 0. Matrices are all tensors of two dimensions.

The result depends on the order; a round is merged by itself, and nothing is kept for the next.
Clients of one task hold the same directions, which only the first of them then gives; what is no
matrix is summed all the same, and gains on the matrices the more, the more alike clients are.
Weights are checked and not used.
*Cost* a thin singular value decomposition of each matrix an update; memory three float64 copies of
the tensors, however many clients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from aggregation.gathered import checked_row, require_some
from aggregation.mergers.merger import Merged
from aggregation.settings import require_number
from aggregation.vectors import checked_weight, named, require_floats, shaped
from protocol.tensors import NOTHING, ParamSpec, Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class OPCMState:
    """What has been added."""

    spec: ParamSpec
    sums: np.ndarray  # float64 [size], S of every tensor, in name order
    norms: float  # Σ ‖update‖
    count: int  # updates


@dataclass(frozen=True, slots=True, kw_only=True)
class OPCM:
    """Streaming, in the order of `add`."""

    name: ClassVar[str] = "opcm"
    sum_only: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    order_independent: ClassVar[bool] = False

    alpha: float = 0.5  # share of the singular values' sum that is protected, from 0 to below 1

    def __post_init__(self) -> None:
        require_number("alpha", self.alpha, "from 0 to below 1", lambda x: 0 <= x < 1)

    def init(
        self, spec: ParamSpec, *, current: Tensors = NOTHING, memory: Tensors = NOTHING
    ) -> OPCMState:
        """Zero sums."""
        require_floats(spec)
        return OPCMState(spec=spec, sums=np.zeros(spec.size), norms=0.0, count=0)

    def add(
        self, state: OPCMState, update: Tensors, weight: float, *, client: str = ""
    ) -> OPCMState:
        """One update more; `weight` is checked and does not count."""
        checked_weight(weight)
        vector = checked_row(state.spec, update)
        norm = math.sqrt(float(vector @ vector))
        parts = zip(named(state.spec, state.sums), named(state.spec, vector), strict=True)
        for (name, before), (_, new) in parts:
            shape = state.spec[name].shape
            if len(shape) == 2:
                new[:] = projected(before.reshape(shape), new.reshape(shape), self.alpha).ravel()
        return OPCMState(
            spec=state.spec,
            sums=state.sums + vector,
            norms=state.norms + norm,
            count=state.count + 1,
        )

    def finish(self, state: OPCMState) -> Merged:
        """The sum, as long as updates are on average; zeros where they cancel to the last bit."""
        require_some(self.name, state.count)
        norm = math.sqrt(float(state.sums @ state.sums))
        scale = state.norms / state.count / norm if norm > 0 else 0.0
        return Merged(delta=shaped(state.spec, state.sums * scale))


def projected(merged: np.ndarray, new: np.ndarray, alpha: float) -> np.ndarray:
    """`new` without what `merged` already holds, float64 [rows, columns] like both."""
    left, values, right = np.linalg.svd(merged, full_matrices=False)
    rank = int(np.count_nonzero(values > values[0] * max(merged.shape) * np.finfo(np.float64).eps))
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    shares = np.cumsum(values) / values.sum()
    protected = int(np.count_nonzero(shares <= alpha))
    seen = left.T @ new @ right.T
    held = np.diag(np.diag(seen))
    held[:protected, :protected] = seen[:protected, :protected]
    return np.asarray(new - left @ held @ right)
