# SPDX-License-Identifier: Apache-2.0
"""Line charts as inline SVG: no library, no script, no font, so that a report opens anywhere.

Colours are classes that the page's style sheet sets for light and dark; every mark carries a
`<title>`, which browsers show when pointed at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 290
LEFT, RIGHT, TOP, BOTTOM = 68, 18, 14, 46
# What stands left of an axis: its name, upright, then the values.
_NAMED, _GAP = 21, 8
# Widths of a value's characters, of 12 pixels height in the widest usual font.
_NARROW, _WIDE, _USUAL = 4.0, 11.5, 7.7
# The style sheet has as many; further series take the first again, dashed.
COLOURS = 8

# Values nearer to each other than this part of them are one value to a chart.
_ALIKE = 1e-9

Text = Callable[[float], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A line: points in order of x, and what each says when pointed at."""

    name: str
    points: tuple[tuple[float, float], ...]
    tips: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.points) != len(self.tips):
            raise ValueError(
                f"series {self.name}: {len(self.points)} points, {len(self.tips)} tips"
            )
        if not all(math.isfinite(v) for point in self.points for v in point):
            raise ValueError(f"series {self.name}: expected finite values; leave others out")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """A straight map from values to a stretch of the drawing, with its ticks."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def scale_over(
    values: Sequence[float], start: float, end: float, *, floor: float, ceiling: float, whole: bool
) -> Scale:
    """A scale over round numbers that holds all values and stays within floor and ceiling.

    `whole` keeps ticks to whole numbers (rounds).
    """
    low, high = min(values), max(values)
    if high - low < _ALIKE * max(1.0, abs(high)):
        pad = 0.05 * abs(low) if abs(low) > _ALIKE else 0.5
        low, high = max(floor, low - pad), min(ceiling, high + pad)
    step = nice_step(high - low, 5)
    if whole:
        step = max(1.0, math.ceil(step))
    low = max(floor, math.floor(low / step) * step)
    high = min(ceiling, max(math.ceil(high / step - _ALIKE), math.floor(low / step) + 1) * step)
    first, last = math.ceil(low / step - _ALIKE), math.floor(high / step + _ALIKE)
    ticks = tuple(index * step for index in range(first, last + 1))
    return Scale(low=low, high=high, start=start, end=end, ticks=ticks)


def nice_step(extent: float, wanted: int) -> float:
    """The 1, 2, 2.5 or 5 times a power of ten that gives about `wanted` ticks."""
    raw = extent / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - _ALIKE))


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_text: Text,
    y_text: Text,
    whole_x: bool = False,
    y_ceiling: float = math.inf,
) -> str:
    """One or several lines over two labelled axes; "" would be no chart, so empty series raise."""
    drawn = [s for s in series if s.points]
    if not drawn:
        raise ValueError(f"chart {title!r}: expected at least one point")
    xs = [x for s in drawn for x, _ in s.points]
    ys = [y for s in drawn for _, y in s.points]
    y_axis = scale_over(ys, HEIGHT - BOTTOM, TOP, floor=0, ceiling=y_ceiling, whole=False)
    left = left_of([y_text(tick) for tick in y_axis.ticks])
    x_axis = scale_over(
        xs if whole_x else [0.0, *xs], left, WIDTH - RIGHT, floor=0, ceiling=math.inf, whole=whole_x
    )
    parts = [*_axes(x_axis, y_axis, x_label, y_label, x_text, y_text)]
    for index, one in enumerate(series):
        if one.points:
            parts += _line(one, index, x_axis, y_axis, markers=len(one.points) <= 60)
    return svg(parts, title=title)


def svg(parts: Sequence[str], *, title: str, height: float = HEIGHT) -> str:
    """The drawing around its parts, as wide as its place."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(title)}">'
        + "".join(parts)
        + "</svg>"
    )


def text(x: float, y: float, content: str, *, anchor: str = "middle", kind: str = "tick") -> str:
    """A label."""
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
        f"{escape(content)}</text>"
    )


def colour_of(index: int) -> str:
    """The class names of a series' colour, and of its dashes past the last colour."""
    return f"c{index % COLOURS}" + (" dashed" if index >= COLOURS else "")


def left_of(values: Sequence[str]) -> float:
    """Where a drawing begins, so that no value reaches into the name of its axis."""
    return max(float(LEFT), _NAMED + _GAP + max(map(_width, values), default=0.0))


def y_grid(
    axis: Scale, y_text: Text, label: str, *, left: float = LEFT, right: float = WIDTH - RIGHT
) -> list[str]:
    """Horizontal lines with their values, and what they measure."""
    parts = []
    for tick in axis.ticks:
        y = axis(tick)
        parts.append(f'<line class="grid" x1="{left:g}" x2="{right:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(text(left - _GAP, y + 4, y_text(tick), anchor="end"))
    middle = (axis.start + axis.end) / 2
    parts.append(
        f'<text class="label" transform="translate(14 {middle:.1f}) rotate(-90)" '
        f'text-anchor="middle">{escape(label)}</text>'
    )
    return parts


def _axes(
    x_axis: Scale, y_axis: Scale, x_label: str, y_label: str, x_text: Text, y_text: Text
) -> list[str]:
    bottom, left = HEIGHT - BOTTOM, x_axis.start
    parts = y_grid(y_axis, y_text, y_label, left=left)
    parts.append(
        f'<line class="axis" x1="{left:g}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>'
    )
    for tick in x_axis.ticks:
        x = x_axis(tick)
        parts.append(
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
        )
        parts.append(text(x, bottom + 18, x_text(tick)))
    parts.append(text((left + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label, kind="label"))
    return parts


def _line(one: Series, index: int, x_axis: Scale, y_axis: Scale, *, markers: bool) -> list[str]:
    places = [(x_axis(x), y_axis(y)) for x, y in one.points]
    colour = colour_of(index)
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [f'<polyline class="line {colour}" points="{path}"/>']
    for number, ((x, y), tip) in enumerate(zip(places, one.tips, strict=True), start=1):
        shown = "dot" if markers or number == len(places) else "hidden"
        parts.append(
            f'<circle class="{shown} {colour}" cx="{x:.1f}" cy="{y:.1f}" r="3.2">'
            f"<title>{escape(one.name)}: {escape(tip)}</title></circle>"
        )
    return parts


def _width(value: str) -> float:
    return sum(_NARROW if c in " .," else _WIDE if c in "%MW" else _USUAL for c in value)
