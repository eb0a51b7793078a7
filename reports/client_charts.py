# SPDX-License-Identifier: Apache-2.0
"""What clients have and reach: the spread of their accuracies, who holds which labels, and which
elements of a pool they select."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from reports.charts import (
    BOTTOM,
    COLOURS,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    colour_of,
    scale_over,
    svg,
    text,
    y_grid,
)

Client = Mapping[str, object]

# A column narrower than a pixel and a half cannot be pointed at.
MAX_COLUMNS = 350


def accuracy_spread(clients: Sequence[Client], domains: Sequence[str]) -> str:
    """Clients in order of their accuracy, a dot each, its area by its held-out samples.

    `domains` (in the order of the legend) colour the dots; [] for one colour.
    """
    ranked = sorted(clients, key=lambda c: (_accuracy(c), str(c["id"])))
    if not ranked:
        raise ValueError("accuracy spread: expected at least one client with an accuracy")
    values = [_accuracy(c) for c in ranked]
    axis = scale_over(values, HEIGHT - BOTTOM, TOP + 6, floor=0, ceiling=1, whole=False)
    right = WIDTH - RIGHT - 88
    parts = y_grid(axis, _percent, "accuracy on held-out samples", right=right)
    marks = []
    for share, name in ((0.1, "worst tenth"), (0.5, "median"), (0.9, "best tenth")):
        value = quantile(values, share)
        y = axis(value)
        parts.append(f'<line class="mark" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append((y, f"{_percent(value, 1)} {name}"))
    # From the lowest up, each label far enough from the one below it.
    floor = HEIGHT - BOTTOM + 8.0
    for y, label in marks:
        floor = min(y + 3.5, floor - 12)
        parts.append(_small(right + 6, floor, label))
    most = max(_whole(c.get("held_out")) for c in ranked) or 1
    step = (right - LEFT) / len(ranked)
    widest = max(1.6, min(8.0, step * 0.75))
    least = min(3.0, widest)
    for index, client in enumerate(ranked):
        held_out = _whole(client.get("held_out"))
        radius = max(least, widest * math.sqrt(held_out / most))
        domain = client.get("domain")
        colour = colour_of(domains.index(str(domain)) if domain in domains else 0)
        tip = f"{client['id']}: {_percent(values[index], 1)} of {held_out} held-out samples"
        tip += f", {domain}" if domain else ""
        parts.append(
            f'<circle class="blob {colour}" cx="{LEFT + (index + 0.5) * step:.1f}" '
            f'cy="{axis(values[index]):.1f}" r="{radius:.1f}"><title>{escape(tip)}</title></circle>'
        )
    label = f"{len(ranked)} clients, from the least to the most accurate"
    parts.append(text((LEFT + right) / 2, HEIGHT - 14, label, kind="label"))
    return svg(parts, title="accuracy of each client on its held-out samples")


def label_map(clients: Sequence[Client], class_names: Sequence[str]) -> str:
    """A column a client and a row a class, darker for a larger share of the client's samples;
    above it a bar with the client's number of samples. Clients are ordered by their commonest
    class, so that an uneven partition shows as a staircase."""
    names = [name if len(name) <= 12 else name[:11] + "…" for name in class_names]
    title = "labels of each client"
    return _share_map(clients, "labels", names, unit="samples", row="class", title=title)


def selection_map(clients: Sequence[Client]) -> str:
    """As `label_map`, of how often each client's samples selected each element of a pool."""
    elements = max((len(_items(client.get("selected"))) for client in clients), default=0)
    names = [str(element) for element in range(elements)]
    title = "elements that each client selects"
    return _share_map(clients, "selected", names, unit="selections", row="element", title=title)


def _share_map(
    clients: Sequence[Client], key: str, names: Sequence[str], *, unit: str, row: str, title: str
) -> str:
    columns = _columns(clients, key)
    if not columns or not names:
        raise ValueError(f"{title}: expected at least one client and one {row}")
    left = max(62.0, 20 + 6.4 * max(len(name) for name in names))
    height_of_row = max(12.0, min(20.0, 240 / len(names)))
    bars, top = 52.0, 72.0
    step = (WIDTH - RIGHT - left) / len(columns)
    gap = 1.0 if step > 5 else 0.0
    most = max(sum(counts) for _, counts in columns)
    height = top + height_of_row * len(names) + 30
    parts = [
        text(left - 6, 20, f"{most}", anchor="end"),
        _small(left - 6, 32, unit, anchor="end"),
        f'<line class="grid" x1="{left:.1f}" x2="{WIDTH - RIGHT}" y1="16" y2="16"/>',
    ]
    for index, name in enumerate(names):
        parts.append(text(left - 6, top + height_of_row * (index + 0.5) + 4, name, anchor="end"))
    for index, (client, counts) in enumerate(columns):
        x, total = left + index * step, sum(counts)
        tall = bars * total / most
        parts.append(
            f'<rect class="bar" x="{x:.2f}" y="{16 + bars - tall:.1f}" width="{step - gap:.2f}" '
            f'height="{tall:.1f}">'
            f"<title>{escape(str(client['id']))}: {total} {unit}</title></rect>"
        )
        for kind, count in enumerate(counts[: len(names)]):
            # Square root: a few must be told from none.
            strength = f' style="fill-opacity:{math.sqrt(count / total):.3f}"'
            tip = f"{client['id']}: {count} of {total} are {names[kind]}"
            place = f'x="{x:.2f}" y="{top + height_of_row * kind:.1f}"'
            size = f'width="{step - gap:.2f}" height="{height_of_row - 1:.1f}"'
            parts.append(f'<rect class="empty" {place} {size}/>')
            parts.append(
                f'<rect class="cell" {place} {size}{strength}><title>{escape(tip)}</title></rect>'
            )
    shown = f"{len(columns)} clients, ordered by their commonest {row}"
    if len(columns) < len(clients):
        shown = f"{len(columns)} of {len(clients)} clients, ordered by their commonest {row}"
    parts.append(text((left + WIDTH - RIGHT) / 2, height - 8, shown, kind="label"))
    return svg(parts, title=title, height=height)


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which a share of the sorted values lies, interpolated."""
    place = share * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (place - low)


def domains_of(clients: Sequence[Client]) -> list[str]:
    """The clients' domains, sorted; [] if there are none, or more than colours."""
    found = sorted({str(c["domain"]) for c in clients if c.get("domain")})
    return found if 1 < len(found) <= COLOURS else []


def _columns(clients: Sequence[Client], key: str) -> list[tuple[Client, list[int]]]:
    pairs = [(c, [_whole(n) for n in _items(c.get(key))]) for c in clients]
    pairs = [(c, counts) for c, counts in pairs if sum(counts)]
    pairs.sort(key=lambda p: (_commonest(p[1]), -max(p[1]) / sum(p[1]), str(p[0]["id"])))
    every = math.ceil(len(pairs) / MAX_COLUMNS)
    return pairs[::every] if every > 1 else pairs


def _commonest(labels: Sequence[int]) -> int:
    return max(range(len(labels)), key=lambda kind: labels[kind])


def _accuracy(client: Client) -> float:
    value = client["accuracy"]
    if not isinstance(value, int | float):
        raise TypeError(f"client {client['id']}: expected an accuracy, got {value!r}")
    return float(value)


def _whole(value: object) -> int:
    return int(value) if isinstance(value, int | float) else 0


def _items(value: object) -> Sequence[object]:
    return value if isinstance(value, Sequence) and not isinstance(value, str) else ()


def _percent(value: float, digits: int = 0) -> str:
    return f"{100 * value:.{digits}f} %"


def _small(x: float, y: float, content: str, *, anchor: str = "start") -> str:
    return text(x, y, content, anchor=anchor, kind="small")
