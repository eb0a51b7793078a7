# SPDX-License-Identifier: Apache-2.0
"""The geometric median's steps with sums alone, for rounds in which nobody sees an update.

The server broadcasts a centre z, where the last round's step ended and 0 in the first. Each client
computes its own weight and what it would move z by,

    w_i = ν/max(ν, ‖x_i - z‖),   t_i = (x_i - z)/max(ν, ‖x_i - z‖),

secure aggregation gives Σ t_i and Σ w_i, and the server goes to z + ν·Σt_i/Σw_i, which is
Σ w_i·x_i / Σ w_i: the step of `geometric_median.py`. A round is one step: two sums of the same
update would tell more of it than one.

What travels is ν·t_i = w_i·(x_i - z), the update less the centre times a weight, and the weight
itself, both summed as `aggregation/summed_weights.py` has it. So ν is the norm of the codec's grid:
a client cuts x_i - z to it, and adds by which factor.

Both terms are bounded whatever the update is, ‖t_i‖ ≤ 1 and 0 < w_i ≤ 1, which is what a grid for
masked sums needs. Weights have 16 bits: ν is to be above a thousandth of honest distances, and not
10⁻⁵. Clients nearer than ν are averaged, and one further away moves the centre by at most as much
as one at ν.

*Source* RFA: Pillutla, Kakade, Harchaoui, "Robust Aggregation for Federated Learning", 2019
(arXiv 1912.13445), algorithm 2, whose point it is that sums are enough.
*Differs from source* one step a round, from where the last one ended, in place of three or four
from the mean; differences from z are summed and not updates, which bounds them; clients
count alike, for an attacker chooses the number of samples that it claims.
*What it does not do* clients weigh themselves. It withstands updates that are wrong (bad labels,
bad data, broken training) in fewer than half of the clients. A client that lies about its terms is
held to their bounds, where these are enforced, and to nothing else: it may always claim w_i = 1.
*Cost* one pass over an update a step, on the device; two float64 copies. The centre travels beside
the tensors: twice the downlink. `memory` holds z as "centre/NAME".
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from aggregation.errors import MergeError
from aggregation.gathered import require_some
from aggregation.mergers.merger import Merged
from aggregation.robust.centres import kept_centre, last_centre
from aggregation.settings import require_number
from aggregation.vectors import checked_vector, checked_weight, flat, require_floats, shaped
from protocol.controls import parted
from protocol.tensors import NOTHING, ParamSpec, Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One client's part of a step, and, added up, all clients'."""

    moved: np.ndarray
    """t_i, float64 [size], of norm 1 at most."""
    weight: float
    """w_i, above 0 and at most 1."""


def client_term(centre: np.ndarray, update: np.ndarray, *, smoothing: float) -> Term:
    """What a client adds to the sums of a step.

    Args:
        centre: z, float64 [size], as it was broadcast.
        update: x_i, [size], in the same order.
        smoothing: ν, above 0.

    Raises: MergeError for another size, or values that are not finite.
    """
    require_smoothing(smoothing)
    if centre.ndim != 1 or update.shape != centre.shape:
        raise MergeError(
            f"expected an update like the centre, [{centre.size}], found {list(update.shape)}"
        )
    difference = np.asarray(update, np.float64) - centre
    if not np.isfinite(difference).all():
        raise MergeError("expected finite values in update and centre, found NaN or infinity")
    # Scaled first: the square of a large value is infinite before its root is taken.
    largest = float(np.abs(difference).max(initial=0.0))
    distance = largest * float(np.linalg.norm(difference / largest)) if largest else 0.0
    if not math.isfinite(distance):
        raise MergeError("expected an update at a finite distance from the centre")
    reach = max(smoothing, distance)
    return Term(moved=difference / reach, weight=smoothing / reach)


def next_centre(centre: np.ndarray, total: Term, *, smoothing: float) -> np.ndarray:
    """Where the centre goes by the sums over all clients: float64 [size].

    Raises: MergeError for sums of nobody, of another size, or that are not finite.
    """
    require_smoothing(smoothing)
    if total.moved.shape != centre.shape:
        raise MergeError(
            f"expected sums like the centre, {list(centre.shape)}, found {list(total.moved.shape)}"
        )
    if not (math.isfinite(total.weight) and total.weight > 0):
        raise MergeError(
            f"expected a sum of weights above 0, found {total.weight:g}: no client took part, or "
            "the grid is too coarse for their weights; use a larger smoothing"
        )
    moved = np.asarray(centre + smoothing * total.moved / total.weight)
    if not np.isfinite(moved).all():
        raise MergeError("expected finite sums of terms, found NaN or infinity")
    return moved


@dataclass(frozen=True, slots=True, kw_only=True)
class StepState:
    """The sums so far."""

    spec: ParamSpec
    centre: np.ndarray
    """z, float64 [size]."""
    total: Term
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedGeometricMedian:
    """The server's half. Updates that it sees itself are made terms here (`add`); of those that it
    does not, a secure sum gives the step (`add_step`)."""

    name: ClassVar[str] = "masked-geometric-median"
    sum_only: ClassVar[bool] = False  # sums of terms are enough, sums of updates are not
    exact: ClassVar[bool] = False
    order_independent: ClassVar[bool] = False

    smoothing: float = 1.0  # ν, above 0: of the order of honest updates' distances from the centre

    def __post_init__(self) -> None:
        require_smoothing(self.smoothing)

    def centre(self, spec: ParamSpec, memory: Tensors = NOTHING) -> dict[str, np.ndarray]:
        """z of the round that starts from that memory. Raises: MergeError."""
        return shaped(spec, last_centre(spec, memory))

    def init(
        self, spec: ParamSpec, *, current: Tensors = NOTHING, memory: Tensors = NOTHING
    ) -> StepState:
        """No terms. A centre that stands in `current` as controls.py writes it is the one that
        clients were sent. Raises: MergeError if the memory is not that of such tensors."""
        require_floats(spec)
        centre = {**self.centre(spec, memory), **parted(current)[1]}
        nothing = Term(moved=np.zeros(spec.size), weight=0.0)
        return StepState(spec=spec, centre=flat(spec, centre), total=nothing, count=0)

    def add(
        self, state: StepState, update: Tensors, weight: float, *, client: str = ""
    ) -> StepState:
        """One update more; `weight` is checked and does not count."""
        checked_weight(weight)
        vector = checked_vector(state.spec, update)
        return _with(state, client_term(state.centre, vector, smoothing=self.smoothing))

    def add_step(self, state: StepState, step: Tensors) -> StepState:
        """All of a round's terms at once: `step` is Σ w_i·(x_i - z) / Σ w_i. Raises: MergeError."""
        vector = checked_vector(state.spec, step)
        return _with(state, Term(moved=vector / self.smoothing, weight=1.0))

    def finish(self, state: StepState) -> Merged:
        """Where the centre goes, as the change and as the memory."""
        require_some(self.name, state.count)
        centre = next_centre(state.centre, state.total, smoothing=self.smoothing)
        return Merged(delta=shaped(state.spec, centre), memory=kept_centre(state.spec, centre))


def _with(state: StepState, term: Term) -> StepState:
    total = Term(moved=state.total.moved + term.moved, weight=state.total.weight + term.weight)
    return replace(state, total=total, count=state.count + 1)


def require_smoothing(smoothing: float) -> None:
    """Raises: MergeError unless it is a finite number above 0."""
    require_number("smoothing", smoothing, "a finite number above 0", lambda x: x > 0)
