# SPDX-License-Identifier: Apache-2.0
"""`fedloom bench split`: what its figures rest on, on a network of two small blocks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from simulations.benchmarks.split_accuracy import HALF, Reached, gap_figure, gap_job
from simulations.benchmarks.split_costs import (
    VIT_B,
    VIT_L,
    Round,
    break_even,
    device_flops_share,
    parameters,
    traffic_share,
)
from simulations.benchmarks.split_exact import plain_split_parity, split_parity
from simulations.benchmarks.split_load import slow_loris_p99_ms, split_batching_ratio
from simulations.benchmarks.split_rate import Case, split_lanes_ratio, split_rate_ratio
from simulations.progress import SilentProgress
from tuning.backbones import load_backbone
from tuning.flop_formulas import ViTShape

QUIET = SilentProgress()


def test_parameters_are_those_of_the_network(tiny_vit: Path) -> None:
    shape = ViTShape(blocks=2, width=16, inner=32, patches=4, patch_values=16, classes=3)
    model = load_backbone(tiny_vit, classes=3, seed=0).model
    assert parameters(shape) == sum(value.numel() for value in model.parameters())
    weights = load_file(tiny_vit / "model.safetensors")
    head = sum(value.size for name, value in weights.items() if name.startswith("classifier"))
    assert parameters(replace(shape, classes=5)) == sum(v.size for v in weights.values())
    assert head == 17 * 5


def test_vit_sizes_are_the_published_ones() -> None:
    # ViT-B/16 and ViT-L/16 with 1,000 classes, as torchvision lists them.
    assert parameters(replace(VIT_B, classes=1000)) == 86_567_656
    assert parameters(replace(VIT_L, classes=1000)) == 304_326_632


def test_samples_at_which_both_send_as_much() -> None:
    assert (break_even(VIT_B), break_even(VIT_L)) == (286, 754)


def test_a_round_carries_states_four_times() -> None:
    small = ViTShape(blocks=2, width=16, inner=32, patches=4, patch_values=16, classes=3, prompts=2)
    one = Round(shape=small, kept=40)
    values = 4 * 40 * 7 * 16 * 4
    assert values < one.stream_bytes() < values + 8 * 300, "two batches of four messages each"
    pooled = Round(shape=small, kept=40, pooled=True)
    assert one.stream_bytes() - pooled.stream_bytes() == pytest.approx(2 * 40 * 6 * 16 * 4, abs=20)
    trained = 2 * 16 + 2 * 16 + 17 * 3
    assert one.total_bytes() - one.stream_bytes() == 2 * 4 * trained


def test_costs_keep_their_bounds() -> None:
    for made in (device_flops_share(), traffic_share(), traffic_share(pooled=True)):
        assert made.holds, made
    assert device_flops_share(replace(VIT_B, blocks=3)).holds is False


def test_every_cut_is_exact() -> None:
    made = split_parity(QUIET)
    assert made.holds
    assert made.note.startswith("30 cuts")


def test_known_identities_hold(tiny_vit: Path, cache_of_the_session: Path) -> None:
    made = plain_split_parity(QUIET, backbone=tiny_vit)
    assert made.holds, made
    assert made.value > 0, "two ways to compute are never bit for bit the same"


@pytest.mark.long
def test_the_rate_is_measured_over_a_real_stream(
    tiny_vit: Path, cache_of_the_session: Path
) -> None:
    case = Case(name="tiny ViT", batch=4, steps=2, repetitions=1, cut="1+0")
    rate = split_rate_ratio(QUIET, small=case, base=None, backbone=tiny_vit, engines=["torch"])
    assert rate.value > 0
    assert "torch body, 2 lanes" in rate.note
    lanes = split_lanes_ratio(QUIET, case=case, backbone=tiny_vit, megabits=1.0)
    assert lanes.value > 1, "transfers wait long enough here to be worth overlapping"


@pytest.mark.long
def test_load_is_measured_over_real_streams(tiny_vit: Path, cache_of_the_session: Path) -> None:
    batching = split_batching_ratio(
        QUIET, backbone=tiny_vit, clients=3, rounds=1, rows=2, repetitions=1
    )
    assert batching.value > 0
    loris = slow_loris_p99_ms(QUIET, backbone=tiny_vit, uploads=5, steps=3)
    assert "beside 5 half-open uploads" in loris.note


def test_the_gap_holds_within_its_points_and_bytes() -> None:
    full = [Reached(0.88, 1_000), Reached(0.86, 1_000)]
    near = gap_figure(full, [Reached(0.87, 400), Reached(0.86, 500)])
    assert near.value == pytest.approx(0.5) and near.holds is True
    assert "at 0.450 of its bytes" in near.note
    assert gap_figure(full, [Reached(0.87, 500), Reached(0.86, 500)]).holds is False
    assert gap_figure(full, [Reached(0.85, 400), Reached(0.86, 400)]).holds is False


def test_both_sides_of_the_gap_see_the_same_data_and_rounds() -> None:
    full, half = gap_job(3), gap_job(3, split=HALF)
    assert (full.data, full.rounds, full.job) == (half.data, half.rounds, half.job)
    assert half.split.keep == 0.5 and half.is_split and not full.is_split
