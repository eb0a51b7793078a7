# SPDX-License-Identifier: Apache-2.0
"""What a private run spent and how it clipped, over its rounds, and what that promises in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from reports.charts import Series, line_chart
from reports.page import section
from reports.run_record import RoundLine

SUMS: Final = (
    "Secure aggregation: of a round's updates the coordinator has seen the sum, and no single one."
)


def privacy_charts(lines: Sequence[RoundLine], privacy: Mapping[str, Any]) -> list[str]:
    """Sections for epsilon, the clipping norm and the share that was not clipped; [] for a run that
    promises nothing."""
    spent = [line for line in lines if line.epsilon is not None]
    if not spent:
        return []
    return [_epsilon(spent, privacy), _clip(spent), *_unclipped(spent)]


def guarantee(privacy: Mapping[str, Any]) -> str:
    """What the result promises, in a sentence or two."""
    neighbours = {
        "add or remove one": "takes part or not",
        "replace one": "holds these samples or any others",
        "one client's update or zeros": "sends its update or zeros",
    }[str(privacy["neighbours"])]
    rdp = privacy.get("epsilon_rdp")
    check = "none" if rdp is None else f"{rdp:.3f}"
    how = f"by privacy loss distributions (Rényi accounting, as a cross-check: {check})"
    noise = f"Noise multiplier {privacy['noise_multiplier']:g}"
    match privacy["mode"]:
        case "distributed":
            how = "by Rényi accounting"
            noise += " of the shares that clients add, of the fewest that a sum has"
        case "local":
            noise += " on each update, added by its client"
        case _:
            noise += f", sampling {privacy['sampling']}"
    budget = f" of a budget of {privacy['budget']:g}" if privacy.get("budget") else ""
    return (
        f"Differential privacy of clients: epsilon = {privacy['epsilon']:.3f}{budget} at delta = "
        f"{privacy['delta']:g}, {how}. Whether any one client {neighbours} hardly changes what may "
        f"come out. {noise}. The result is covered; this report names clients, and is for the "
        "operator."
    )


def _epsilon(lines: Sequence[RoundLine], privacy: Mapping[str, Any]) -> str:
    spent = Series(
        name="epsilon",
        points=tuple((float(line.round), line.epsilon or 0.0) for line in lines),
        tips=tuple(f"{line.epsilon:.3f} after round {line.round}" for line in lines),
    )
    drawn, budget = [spent], privacy.get("budget")
    if budget:
        ends = sorted({float(lines[0].round), float(lines[-1].round)})
        drawn.append(
            Series(
                name="budget",
                points=tuple((end, float(budget)) for end in ends),
                tips=tuple(f"{budget:g}" for _ in ends),
            )
        )
    chart = line_chart(
        drawn,
        title="epsilon over rounds",
        x_label="round",
        y_label="epsilon spent",
        x_text=lambda value: f"{value:g}",
        y_text=lambda value: f"{value:g}",
        whole_x=True,
    )
    words = "All rounds so far together" + (", and the budget." if budget else "; no budget.")
    return section("Privacy spent", words, chart)


def _clip(lines: Sequence[RoundLine]) -> str:
    norms = Series(
        name="clipping norm",
        points=tuple((float(line.round), line.clip or 0.0) for line in lines),
        tips=tuple(f"{line.clip:.4g} in round {line.round}" for line in lines),
    )
    chart = line_chart(
        [norms],
        title="clipping norm over rounds",
        x_label="round",
        y_label="l2 norm",
        x_text=lambda value: f"{value:g}",
        y_text=lambda value: f"{value:.3g}",
        whole_x=True,
    )
    return section("Clipping norm", "Longer updates are cut to it.", chart)


def _unclipped(lines: Sequence[RoundLine]) -> list[str]:
    told = [line for line in lines if line.unclipped is not None]
    if not told:
        return []
    # Noise may carry a share below 0, where the axis ends.
    shares = Series(
        name="not clipped",
        points=tuple((float(line.round), max(line.unclipped or 0.0, 0.0)) for line in told),
        tips=tuple(f"{line.unclipped:.1%} in round {line.round}" for line in told),
    )
    chart = line_chart(
        [shares],
        title="share of updates that were not clipped",
        x_label="round",
        y_label="share, noised",
        x_text=lambda value: f"{value:g}",
        y_text=lambda value: f"{100 * value:.3g} %",
        whole_x=True,
    )
    return [section("Updates that were not clipped", "As it was released: with noise.", chart)]
