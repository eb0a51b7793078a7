# SPDX-License-Identifier: Apache-2.0
"""One measured figure, and the two forms in which a benchmark shows its figures."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from reports.machine import machine, versions

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "==": operator.eq,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A figure with its target.

    `target` is a comparison such as "<= 1e-5" or ">= 2.3", or "" for a figure that is only
    reported. `holds` is None where there is no target, or where the figure could not be measured
    (`value` is NaN then, and `note` says why).
    """

    name: str
    value: float
    unit: str = ""
    target: str = ""
    holds: bool | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(f"figure name must be a plain identifier, got {self.name!r}")
        if math.isnan(self.value) and not self.note:
            raise ValueError(f"figure {self.name} has no value; its note must say why")


def figure(name: str, value: float, *, unit: str = "", target: str = "", note: str = "") -> Figure:
    """A figure whose `holds` follows from the value and the target.

    Raises: ValueError for a target that is not a comparison with a number.
    """
    holds: bool | None = None
    if target:
        word, _, bound = target.partition(" ")
        if word not in _COMPARISONS:
            allowed = ", ".join(_COMPARISONS)
            raise ValueError(f"figure {name}: target {target!r} must start with one of {allowed}")
        if not math.isnan(value):
            holds = _COMPARISONS[word](value, float(bound))
    return Figure(name=name, value=value, unit=unit, target=target, holds=holds, note=note)


def to_document(figures: Sequence[Figure]) -> dict[str, object]:
    """The JSON object of `fedloom bench --json`; names and keys are stable."""
    return {
        "figures": [
            {
                "name": f.name,
                "value": None if math.isnan(f.value) else f.value,
                "unit": f.unit,
                "target": f.target,
                "holds": f.holds,
                "note": f.note,
            }
            for f in figures
        ],
        "machine": machine(),
        "versions": versions(),
    }


def to_json(figures: Sequence[Figure]) -> str:
    """`to_document` as text."""
    return json.dumps(to_document(figures), indent=2) + "\n"


def to_table(figures: Sequence[Figure]) -> str:
    """A plain table, one figure a line, that reads the same in a terminal and in a log."""
    rows = [("figure", "value", "unit", "target", "holds", "")]
    rows += [(f.name, _number(f.value), f.unit, f.target, _verdict(f), f.note) for f in figures]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = []
    for row in rows:
        cells = [row[i].rjust(widths[i]) if i == 1 else row[i].ljust(widths[i]) for i in range(5)]
        lines.append("  ".join([*cells, row[5]]).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:.2e}"


def _verdict(f: Figure) -> str:
    if f.holds is None:
        return "-"
    return "yes" if f.holds else "NO"
