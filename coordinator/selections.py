# SPDX-License-Identifier: Apache-2.0
"""What clients tell of a pool: how often their samples selected each element."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

_PREFIX: Final = "selected/"


def selection_counts(metrics: Mapping[str, float], elements: int) -> list[float]:
    """The counts, element by element; [] where a client told none, or not one for each."""
    counts = [metrics.get(f"{_PREFIX}{place}", math.nan) for place in range(elements)]
    return counts if all(0 <= count < math.inf for count in counts) else []


def unselected(counts: Mapping[str, Sequence[float]]) -> list[str]:
    """A note on the elements that no client's samples selected; [] if there is none."""
    if not counts:
        return []
    elements = len(next(iter(counts.values())))
    used = {place for row in counts.values() for place, count in enumerate(row) if count > 0}
    unused = [str(place) for place in range(elements) if place not in used]
    if not unused:
        return []
    named = ", ".join(unused[:10]) + (" and others" if len(unused) > 10 else "")
    return [
        f"{len(unused)} of {elements} elements were selected by nobody, so that only weight decay "
        f"can move them: {named}"
    ]
