# SPDX-License-Identifier: Apache-2.0
"""The mean of those updates that, taken in turn, make a held-out accuracy better.

Candidates are sorted by their own accuracy, the best first; each joins the soup if the mean with it
is strictly more accurate than without.

*Source* Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves
accuracy without increasing inference time", ICML 2022 (arXiv 2203.05482), the greedy soup. Equal
accuracies keep the order in which candidates came.

The server needs samples for it that no client trains on and no test counts: an accuracy that the
soup was chosen by says nothing of it any more. Sample weights are checked and not used.
*Cost* 2n - 1 evaluations; memory two float64 copies of the tensors, and as a merger one float32 row
an update, on disk beyond a budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar, NamedTuple

import numpy as np

from aggregation.errors import MergeError
from aggregation.gathered import (
    Gathered,
    checked_row,
    gathered,
    nothing_gathered,
    require_some,
)
from aggregation.mergers.merger import Merged
from aggregation.vectors import require_floats, shaped
from protocol.errors import SpecError
from protocol.tensors import NOTHING, ParamSpec, Tensors

Evaluate = Callable[[Tensors], float]  # tensors to an accuracy, 0 to 1


class SoupState(NamedTuple):
    """What has been added, and what it is a change of."""

    updates: Gathered
    current: Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class GreedySoup:
    """The greedy soup of a round's updates; `evaluate` is given the current tensors changed by it,
    or the change where `init` was given none."""

    name: ClassVar[str] = "greedy-soup"
    sum_only: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    order_independent: ClassVar[bool] = False  # of equal accuracies the first is tried first

    evaluate: Evaluate

    def __post_init__(self) -> None:
        if not callable(self.evaluate):
            raise MergeError(f"evaluate: expected a callable, found {self.evaluate!r}")

    def init(
        self, spec: ParamSpec, *, current: Tensors = NOTHING, memory: Tensors = NOTHING
    ) -> SoupState:
        """No rows. Raises: MergeError for current tensors that do not fit the spec."""
        if current and (problem := spec.mismatch(current)):
            raise MergeError(f"current tensors: {problem}")
        return SoupState(nothing_gathered(spec, memory), current)

    def add(
        self, state: SoupState, update: Tensors, weight: float, *, client: str = ""
    ) -> SoupState:
        """One update more; `weight` is checked and does not count."""
        return SoupState(gathered(state.updates, update, weight, client), state.current)

    def finish(self, state: SoupState) -> Merged:
        """The soup. Raises: MergeError if an accuracy is not a finite number."""
        updates, current = state
        require_some(self.name, len(updates))

        def accuracy(delta: Tensors) -> float:
            changed = {name: before + delta[name] for name, before in current.items()}
            return self.evaluate(changed or delta)

        return Merged(delta=_soup(updates.spec, len(updates), updates.rows.row, accuracy))


def greedy_soup(candidates: Sequence[Tensors], evaluate: Evaluate) -> dict[str, np.ndarray]:
    """The greedy soup of one change or more, all of the same names, shapes and types.

    Raises: MergeError if there is none, one does not fit the first or is not finite, or an accuracy
    is not a finite number.
    """
    require_some(GreedySoup.name, len(candidates))
    try:
        spec = ParamSpec.of(candidates[0])
    except SpecError as error:
        raise MergeError(f"cannot merge: {error}") from None
    require_floats(spec)
    rows = [checked_row(spec, candidate) for candidate in candidates]
    return _soup(spec, len(rows), rows.__getitem__, evaluate)


def _soup(
    spec: ParamSpec, count: int, row: Callable[[int], np.ndarray], evaluate: Evaluate
) -> dict[str, np.ndarray]:
    alone = [_accuracy(evaluate, shaped(spec, row(number))) for number in range(count)]
    best_first = sorted(range(count), key=lambda number: -alone[number])
    sums, taken, best = row(best_first[0]).astype(np.float64), 1, alone[best_first[0]]
    for number in best_first[1:]:
        larger = sums + row(number)
        accuracy = _accuracy(evaluate, shaped(spec, larger / (taken + 1)))
        if accuracy > best:
            sums, taken, best = larger, taken + 1, accuracy
    return shaped(spec, sums / taken)


def _accuracy(evaluate: Evaluate, delta: Tensors) -> float:
    accuracy: object = evaluate(delta)
    if not (isinstance(accuracy, Real) and math.isfinite(accuracy)):
        raise MergeError(f"evaluate: expected a finite number, it gave {accuracy!r}")
    return float(accuracy)
