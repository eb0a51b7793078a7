# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reports.charts import Series, line_chart, nice_step, scale_over
from reports.client_charts import quantile
from reports.units import bytes_text, count_text, duration_text


@given(
    values=st.lists(st.floats(0, 1e9, allow_subnormal=False), min_size=1, max_size=20),
    whole=st.booleans(),
)
def test_scale_holds_every_value_within_its_ends(values: list[float], whole: bool) -> None:
    scale = scale_over(values, 0, 100, floor=0, ceiling=math.inf, whole=whole)
    for value in values:
        assert -1e-6 <= scale(value) <= 100 + 1e-6
    assert all(-1e-6 <= scale(tick) <= 100 + 1e-6 for tick in scale.ticks)
    assert len(scale.ticks) <= 12


def test_scale_stops_at_the_ceiling() -> None:
    scale = scale_over([0.93, 0.99], 0, 100, floor=0, ceiling=1, whole=False)
    assert scale.high == 1
    assert scale.ticks == pytest.approx((0.92, 0.94, 0.96, 0.98, 1.0))


@pytest.mark.parametrize(("extent", "step"), [(1, 0.2), (8, 2), (0.07, 0.02), (130, 50), (11, 2.5)])
def test_nice_step_is_round(extent: float, step: float) -> None:
    assert nice_step(extent, 5) == pytest.approx(step)


def test_series_is_refused_when_a_point_is_not_finite() -> None:
    with pytest.raises(ValueError, match="finite"):
        Series(name="a", points=((1.0, math.nan),), tips=("?",))


def test_chart_is_refused_without_a_point() -> None:
    empty = Series(name="a", points=(), tips=())
    with pytest.raises(ValueError, match="at least one point"):
        line_chart(
            [empty], title="t", x_label="x", y_label="y", x_text=bytes_text, y_text=bytes_text
        )


@given(st.floats(1e-7, 1e7), st.floats(0, 0.5))
def test_values_of_an_axis_stay_clear_of_its_name(size: float, spread: float) -> None:
    series = Series(name="a", points=((1.0, size), (2.0, size * (1 + spread))), tips=("", ""))
    drawn = line_chart(
        [series], title="t", x_label="x", y_label="y", x_text=str, y_text=lambda v: f"{v:.3g}"
    )
    values = re.findall(
        r'<text class="tick" x="([\d.]+)" y="[\d.]+" text-anchor="end">([^<]+)', drawn
    )
    assert values
    ((name,),) = [re.findall(r"translate\(([\d.]+) ", drawn)]
    # Half of the font's 12 pixels is the least that a digit takes; the name's tails take four.
    assert all(
        float(end) - 6 * len(value.replace(".", "")) > float(name) + 4 for end, value in values
    )
    begins = set(re.findall(r'class="grid" x1="([\d.]+)"', drawn))
    assert len(begins) == 1 and f'class="axis" x1="{begins.pop()}" x2="542"' in drawn


def test_quantile_interpolates() -> None:
    assert quantile([0.0, 1.0], 0.5) == 0.5
    assert quantile([3.0], 0.9) == 3.0


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (812, "812 B"), (999.6, "1 kB"), (4_230_000, "4.23 MB"), (5e15, "5e+03 TB")],
)
def test_bytes_read_in_powers_of_1000(count: float, text: str) -> None:
    assert bytes_text(count) == text


def test_counts_and_durations_read_well() -> None:
    assert [count_text(n) for n in (12, 9_610, 1.2e6)] == ["12", "9.61 k", "1.2 M"]
    assert [duration_text(s) for s in (1.31, 11.4, 75, 3723)] == [
        "1.3 s",
        "11 s",
        "1:15",
        "1:02:03",
    ]
