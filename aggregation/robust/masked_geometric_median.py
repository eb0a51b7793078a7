# SPDX-License-Identifier: Apache-2.0
"""The geometric median's steps with sums alone, for rounds in which nobody sees an update.

The server broadcasts a centre z. Each client computes its own weight and what it would move z by,

    w_i = ν/max(ν, ‖x_i - z‖),   t_i = (x_i - z)/max(ν, ‖x_i - z‖),

secure aggregation gives Σ t_i and Σ w_i, and the server goes to z + ν·Σt_i/Σw_i, which is
Σ w_i·x_i / Σ w_i: the step of `geometric_median.py`. A step is a round of secure sums more.

Both terms are bounded whatever the update is, ‖t_i‖ ≤ 1 and 0 < w_i ≤ 1, which is what a grid for
masked sums needs: clip at 1. Steps of the grid have to be fine enough for w_i of a client ‖x_i - z‖
away, ν/‖x_i - z‖; so ν is to be of the order of honest distances here, and not 10⁻⁵. Clients nearer
than ν are then averaged, and one further away moves the centre by at most as much as one at ν.

*Source* RFA: Pillutla, Kakade, Harchaoui, "Robust Aggregation for Federated Learning", 2019 (arXiv
1912.13445), algorithm 2, whose point it is that sums are enough.
*Differs from source* differences from z are summed and not updates, which bounds them; clients
count alike, for an attacker chooses the number of samples that it claims.
*What it does not do* clients weigh themselves. It withstands updates that are wrong (bad labels,
bad data, broken training) in fewer than half of the clients. A client that lies about its terms is
held to their bounds, where these are enforced, and to nothing else: it may always claim w_i = 1.
*Cost* one pass over an update a step, on the device; two float64 copies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from aggregation.errors import MergeError
from aggregation.settings import require_number


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

    The first centre of all is the mean of the updates, an ordinary sum; or, for less, where the
    last round's ended.
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


def require_smoothing(smoothing: float) -> None:
    """Raises: MergeError unless it is a finite number above 0."""
    require_number("smoothing", smoothing, "a finite number above 0", lambda x: x > 0)
