# SPDX-License-Identifier: Apache-2.0
"""Drop most values of each update at random and enlarge the rest; then merge.

Each value is dropped with chance p and otherwise divided by 1 - p, so that an update stays in
expectation what it was; then the weighted mean is taken, or TIES.

*Source* DARE: Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous
Models as a Free Lunch", ICML 2024 (arXiv 2311.03099), and its authors' code (yule-BUAA/MergeLM).
*Differs from source* the choice is drawn from a hash of the client's name and the number of rounds
in `memory`: it depends neither on the order in which updates come nor on what they hold, and no
value of a client is dropped for ever. `scaling` belongs to TIES alone.

The mean is of no more use to a federation than the plain one, which has no such noise: this is for
studying how much of an update can be spared.
*Cost* that of `WeightedMean` or `TIES`, and one random number a value.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from aggregation.errors import MergeError
from aggregation.gathered import Gathered, checked_row, require_some
from aggregation.mergers.merger import Merged
from aggregation.mergers.ties import TIES
from aggregation.mergers.weighted_mean import MeanState, WeightedMean
from aggregation.settings import require_number
from aggregation.vectors import shaped
from protocol.tensors import NOTHING, ParamSpec, Tensors

_ROUNDS: Final = "rounds"


@dataclass(frozen=True, slots=True, kw_only=True)
class DAREState:
    """What has been added, with values dropped."""

    kept: MeanState | Gathered
    rounds: int  # before this one


@dataclass(frozen=True, slots=True, kw_only=True)
class DARE:
    """Drop and rescale, then the mean or TIES."""

    name: ClassVar[str] = "dare"
    sum_only: ClassVar[bool] = False  # each client's values are dropped before sums are taken
    exact: ClassVar[bool] = False
    order_independent: ClassVar[bool] = False

    drop: float = 0.9  # p, from 0 to below 1
    then: str = "mean"  # or "ties"
    density: float = 0.2  # for TIES: share of all values, dropped ones included
    scaling: float = 1.0  # for TIES: λ

    def __post_init__(self) -> None:
        require_number("drop", self.drop, "from 0 to below 1", lambda x: 0 <= x < 1)
        if self.then not in ("mean", "ties"):
            raise MergeError(f'then: expected "mean" or "ties", found {self.then!r}')
        TIES(density=self.density, scaling=self.scaling)

    def init(
        self, spec: ParamSpec, *, current: Tensors = NOTHING, memory: Tensors = NOTHING
    ) -> DAREState:
        """Nothing added. Raises: MergeError if the memory holds no number of rounds."""
        kept = WeightedMean().init(spec) if self.then == "mean" else self._ties.init(spec)
        return DAREState(kept=kept, rounds=_rounds(memory))

    def add(
        self, state: DAREState, update: Tensors, weight: float, *, client: str = ""
    ) -> DAREState:
        """One update more. Raises: MergeError also without the client's name, or where a value is
        beyond its type once enlarged."""
        if not client:
            raise MergeError(f"{self.name}: expected the client's name, found none")
        spec = state.kept.spec
        vector = checked_row(spec, update)
        stays = _random(client, state.rounds, vector.size) >= self.drop
        sparse = shaped(spec, np.where(stays, vector / (1 - self.drop), 0))
        kept: MeanState | Gathered
        if isinstance(state.kept, Gathered):
            kept = self._ties.add(state.kept, sparse, weight, client=client)
        else:
            kept = WeightedMean().add(state.kept, sparse, weight)
        return DAREState(kept=kept, rounds=state.rounds)

    def finish(self, state: DAREState) -> Merged:
        """The merged change, and one round more in the memory."""
        if isinstance(state.kept, Gathered):
            require_some(self.name, len(state.kept))
            delta: Mapping[str, np.ndarray] = self._ties.finish(state.kept).delta
        else:
            require_some(self.name, state.kept.count)
            delta = WeightedMean().finish(state.kept).delta
        return Merged(delta=delta, memory={_ROUNDS: np.array(state.rounds + 1.0)})

    @property
    def _ties(self) -> TIES:
        return TIES(density=self.density, scaling=self.scaling)


def _random(client: str, rounds: int, size: int) -> np.ndarray:
    """float64 [size], evenly from 0 to below 1, the same for the same client and round."""
    text = f"dare {rounds} {client}".encode("utf-8", "surrogatepass")
    key = int.from_bytes(hashlib.sha256(text).digest()[:16], "little")
    # a raw stream is the same in every release of numpy; what Generator makes of it need not be
    words = np.random.Philox(key=key).random_raw(size)
    return (words >> np.uint64(11)) * 2.0**-53


def _rounds(memory: Tensors) -> int:
    rounds = memory.get(_ROUNDS, np.zeros(()))
    if rounds.shape != () or not (0 <= rounds < 2**53 and rounds == np.floor(rounds)):
        raise MergeError(f'memory "{_ROUNDS}": expected a whole number, found {rounds}')
    return int(rounds)
