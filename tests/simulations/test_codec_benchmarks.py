# SPDX-License-Identifier: Apache-2.0
"""Figures of codecs and mergers, from curves and cases that are written down here."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from simulations.benchmarks import aggregation, attacks
from simulations.benchmarks.codecs import (
    Curve,
    bytes_to_accuracy_figure,
    codec_vs_zlib,
    ternary_entropy_ratio,
    update_bytes_figure,
)
from simulations.progress import SilentProgress


def curve(*accuracy: float, up: int, down: int) -> Curve:
    rounds = len(accuracy)
    return Curve(accuracy=accuracy, uplink=(up,) * rounds, downlink=(down,) * rounds)


PLAIN = [curve(0.5, 0.7, 0.8, 0.8, up=100, down=100)]


def test_bytes_are_counted_to_the_first_round_that_is_good_enough() -> None:
    run = curve(0.5, 0.7, 0.8, up=3, down=2)
    assert [run.bytes_until(goal) for goal in (0.4, 0.7, 0.75, 0.9)] == [5, 10, 15, math.inf]


def test_update_bytes_are_those_of_the_smallest_codec_that_loses_little() -> None:
    curves = {
        "float32": PLAIN,
        "one-bit": [curve(0.7, 0.797, up=4, down=1)],
        "ternary": [curve(0.7, 0.79, up=1, down=1)],
    }
    made = update_bytes_figure(curves)
    assert made.value == pytest.approx(8 / 400) and made.holds
    assert made.note.startswith("one-bit; float32 0.8000; one-bit 1/50 for +0.30 points, ternary")


def test_update_bytes_fail_when_every_codec_loses_too_much() -> None:
    made = update_bytes_figure({"float32": PLAIN, "one-bit": [curve(0.7, up=1, down=1)]})
    assert made.holds is False and made.note.startswith("none loses at most 0.5 points")


def test_bytes_to_accuracy_compare_the_way_to_the_same_accuracy() -> None:
    curves = {
        "float32": PLAIN,  # 0.76 is reached in round 3, after 600 bytes
        "one-bit": [curve(0.5, 0.76, up=4, down=1)],
        "never": [curve(0.5, up=1, down=1)],
    }
    made = bytes_to_accuracy_figure(curves)
    assert made.value == pytest.approx(10 / 600) and made.holds
    assert "one-bit 1/60, never not reached of" in made.note


def test_ternary_stays_near_the_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simulations.benchmarks.codecs.SIZES", (10_000,))
    made = ternary_entropy_ratio()
    assert made.holds and 1 < made.value < 1.02


def test_codecs_are_timed_beside_zlib() -> None:
    made = codec_vs_zlib(size=20_000, repetitions=1)
    assert made.value > 0 and "ternary:0.05" in made.note


def test_exact_mergers_are_exact_and_truncation_is_shown() -> None:
    made = aggregation.exact_merge_error()
    assert made.holds and 0 < made.value < 1e-6
    assert "flexlora mixed ranks 0." in made.note


def test_merging_is_measured_beside_copying() -> None:
    made = aggregation.merge_vs_copy(SilentProgress(), updates=20, values=40_000)
    assert made.name == "merge_vs_copy" and made.value > 0 and "krum" in made.note


@pytest.mark.parametrize(
    ("clean", "rule", "worst", "holds"),
    [
        (0.97, 0.968, 0.95, True),
        (0.97, 0.968, 0.93, False),
        (0.97, 0.96, 0.95, False),
        (0.95, 0.95, 0.945, False),
    ],
    ids=["all hold", "worst case", "clean cost", "clean mean"],
)
def test_attack_figure_holds_only_if_all_of_its_promise_does(
    clean: float, rule: float, worst: float, holds: bool
) -> None:
    means = {
        ("mean", "none"): clean, ("mean", "alie"): 0.2, ("mean", "ipm"): 0.3,
        ("clip", "none"): rule, ("clip", "alie"): worst, ("clip", "ipm"): 0.96,
    }  # fmt: skip
    made = attacks.attack_figure(means, ("mean", "clip"), ("alie", "ipm"), seeds=1)
    assert made.holds is holds and made.value == worst
    assert "clip under alie" in made.note and "mean: none" in made.note


@pytest.mark.slow
def test_attacks_are_played_against_each_rule(
    monkeypatch: pytest.MonkeyPatch, tiny_job: Callable[..., Any]
) -> None:
    from coordinator.sections import AggregationSection, RoundsSection

    def small(seed: int, merger: str) -> Any:
        return tiny_job(
            "lora",
            rounds=RoundsSection(count=2),
            aggregation=AggregationSection(merger=merger, factors="up", weighting="uniform"),
        )

    monkeypatch.setattr(attacks, "attack_job", small)
    monkeypatch.setattr(attacks, "BAD", 1)
    made = attacks.attack_worst_accuracy(
        SilentProgress(), rules=("weighted-mean", "median"), attacks=("sign-flip:10", "label-flip"),
        seeds=(0,),
    )  # fmt: skip
    assert made.name == "attack_worst_accuracy" and 0 <= made.value <= 1
    assert "median: none 0." in made.note and "label-flip 0." in made.note
