# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math

import pytest

from simulations.benchmarks.figure import figure, to_json, to_table


@pytest.mark.parametrize(
    ("value", "target", "holds"),
    [
        (3e-8, "<= 1e-5", True),
        (2.2, ">= 2.3", False),
        (1.0, "< 1", False),
        (205_824, "== 205824", True),
        (205_825, "== 205824", False),
        (1.0, "", None),
    ],
)
def test_figure_holds_when_its_target_is_met(value: float, target: str, holds: bool | None) -> None:
    assert figure("cohort_parity", value, target=target).holds is holds


def test_figure_without_a_value_says_why_and_becomes_null() -> None:
    missing = figure("central_gap", math.nan, target="<= 5", note="needs Fashion-MNIST")
    assert missing.holds is None
    (entry,) = json.loads(to_json([missing]))["figures"]
    assert entry["value"] is None
    assert entry["note"] == "needs Fashion-MNIST"
    with pytest.raises(ValueError, match="note must say why"):
        figure("central_gap", math.nan)


@pytest.mark.parametrize("target", ["1e-5", "= 3", "=<3"])
def test_figure_is_refused_when_its_target_is_no_comparison(target: str) -> None:
    with pytest.raises(ValueError, match="must start with one of"):
        figure("x", 1.0, target=target)


def test_table_lines_up_and_shows_small_and_large_values() -> None:
    table = to_table(
        [
            figure("onnx_parity", 3e-8, target="<= 1e-5"),
            figure("cohort_vs_sequential", 2.74, target=">= 2.3", note="100 clients"),
            figure("bytes", 12_345_678, unit="B"),
        ]
    )
    lines = table.splitlines()
    assert len({line.index(word) for line, word in zip(lines[2:4], ("<=", ">="), strict=True)}) == 1
    assert "3.00e-08" in lines[2] and "yes" in lines[2]
    assert lines[3].endswith("100 clients")
    assert "1.23e+07" in lines[4]
