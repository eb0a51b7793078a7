# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace
from typing import Any

from reports.privacy_charts import guarantee, privacy_charts
from reports.run_record import RoundLine
from reports.units import privacy_words

PLAIN = RoundLine(
    round=1, accuracy=None, loss=None, train_loss=None, uplink_bytes=1, downlink_bytes=1,
    clients=3, updates=3, samples=9, rejections=0, seconds=1.0,
)  # fmt: skip
PRIVACY: dict[str, Any] = {
    "epsilon": 2.5, "epsilon_rdp": 2.9, "delta": 1e-5, "budget": 8.0, "left": 5.5,
    "neighbours": "add or remove one", "noise_multiplier": 1.2, "clip": 0.25, "unclipped": None,
    "mode": "central", "sampling": "poisson",
}  # fmt: skip


def lines(**changes: Any) -> list[RoundLine]:
    return [
        replace(PLAIN, round=number, epsilon=number / 2, clip=0.1 * number, **changes)
        for number in (1, 2, 3)
    ]


def test_a_run_that_promises_nothing_has_no_charts() -> None:
    assert privacy_charts([PLAIN], {}) == []
    assert privacy_words({}) == ""


def test_epsilon_stands_beside_its_budget_and_the_norm_by_itself() -> None:
    spent, norm = privacy_charts(lines(), PRIVACY)
    assert spent.count("<polyline") == 2 and "1.500 after round 3" in spent
    assert norm.count("<polyline") == 1 and "0.3 in round 3" in norm
    without, _ = privacy_charts(lines(), {**PRIVACY, "budget": None})
    assert without.count("<polyline") == 1 and "no budget" in without


def test_the_share_that_was_not_clipped_is_drawn_where_it_was_released() -> None:
    # Noise may carry it below nothing: the tip says so, the line stays on the paper.
    charts = privacy_charts(lines(unclipped=-0.07), PRIVACY)
    assert len(charts) == 3
    assert "-7.0% in round 1" in charts[2] and "with noise" in charts[2]


def test_one_round_is_a_chart_too() -> None:
    assert all("<svg" in chart for chart in privacy_charts(lines()[:1], PRIVACY))


def test_the_guarantee_says_about_whom_and_by_which_accounting() -> None:
    words = guarantee(PRIVACY)
    assert "epsilon = 2.500 of a budget of 8 at delta = 1e-05" in words
    assert "takes part or not" in words and "2.900" in words
    replaced = guarantee(
        {**PRIVACY, "neighbours": "replace one", "budget": None, "epsilon_rdp": None}
    )
    assert "holds these samples or any others" in replaced
    assert "budget" not in replaced and "cross-check: none" in replaced


def test_the_guarantee_says_who_adds_the_noise() -> None:
    shared = guarantee(
        {**PRIVACY, "mode": "distributed", "neighbours": "one client's update or zeros"}
    )
    assert "by Rényi accounting" in shared and "sends its update or zeros" in shared
    assert "shares that clients add" in shared and "sampling" not in shared
    local = guarantee({**PRIVACY, "mode": "local", "neighbours": "replace one"})
    assert "on each update, added by its client" in local
