# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.codecs import Seeds, SumCodec, codec_named
from aggregation.codecs.common_grid import sum_bits
from aggregation.errors import CodecError
from aggregation.summed_weights import (
    FULL,
    digit_count,
    digits,
    summed_weight,
    weight_of_samples,
    weight_of_share,
)
from protocol.tensors import ParamSpec

LEVELS = st.sampled_from([1, 2, 3, 15, 255, 1023, FULL, 2**16]) | st.integers(1, 5000)
WEIGHTS = st.lists(st.integers(1, FULL), min_size=1, max_size=40)


@given(WEIGHTS, LEVELS)
def test_the_sum_of_weights_is_exact_over_any_clients(weights: list[int], levels: int) -> None:
    """Also modulo the power of two that the codec's own integers are summed with."""
    rows = [digits(weight, levels) for weight in weights]
    assert all(row.max() <= levels for row in rows)
    sums = np.sum(rows, axis=0, dtype=np.uint64) % np.uint64(1 << sum_bits(levels, len(weights)))
    assert summed_weight(sums, len(weights), levels) == sum(weights)


@given(LEVELS)
def test_there_are_as_many_digits_as_a_weight_needs(levels: int) -> None:
    count = digit_count(levels)
    assert (levels + 1) ** (count - 1) <= FULL < (levels + 1) ** count


@given(st.integers(0, 10**7), st.integers(1, 10**6))
def test_a_weight_is_the_share_of_the_samples_that_have_the_full_one(n: int, full_at: int) -> None:
    weight = weight_of_samples(n, full_at)
    assert 1 <= weight <= FULL
    assert weight == 1 or 0 <= min(n, full_at) / full_at - weight / FULL < 1 / FULL + 1e-12
    assert (weight == FULL) == (n >= full_at)
    assert weight <= weight_of_samples(n + 1, full_at)


@given(st.floats(0, 1, exclude_min=True))
def test_a_share_is_rounded_down_and_never_to_nothing(share: float) -> None:
    weight = weight_of_share(share)
    assert 1 <= weight <= FULL
    assert weight == 1 or weight <= share * FULL < weight + 1


@pytest.mark.parametrize("levels", [1, 2, 255])
def test_sums_that_so_many_clients_cannot_have_are_refused(levels: int) -> None:
    full = np.sum([digits(FULL, levels)] * 3, axis=0)
    assert summed_weight(full, 3, levels) == 3 * FULL
    for sums, count, what in (
        (np.zeros_like(full), 3, "expected 3 to"),
        (digits(2, levels), 3, "expected 3 to"),
        (full, 2, "expected 2 to"),
        (full[1:], 3, "expected shape"),
    ):
        with pytest.raises(CodecError, match=what):
            summed_weight(sums, count, levels)


def test_one_digit_beyond_what_clients_have_is_refused_though_their_sum_is_not() -> None:
    sums = np.array([2 * 255 + 1, 0])
    assert 2 <= sums[0] <= 2 * FULL
    with pytest.raises(CodecError, match="in digits of at most 510, found 511"):
        summed_weight(sums, 2, 255)


@pytest.mark.parametrize("weight", [0, FULL + 1, -1])
def test_weights_of_more_than_16_bits_and_none_are_refused(weight: int) -> None:
    with pytest.raises(CodecError, match="expected 1 to 65535"):
        digits(weight, 255)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.1, float("nan"), float("inf")])
def test_shares_beyond_the_full_weight_are_refused(share: float) -> None:
    with pytest.raises(CodecError, match="expected a share above 0, at most 1"):
        weight_of_share(share)


@pytest.mark.parametrize(("samples", "full_at"), [(-1, 10), (5, 0)])
def test_samples_below_0_and_a_full_weight_from_nothing_on_are_refused(
    samples: int, full_at: int
) -> None:
    with pytest.raises(CodecError, match="expected 0 samples or more"):
        weight_of_samples(samples, full_at)


# Small clients, a few large ones, and one beyond those with the full weight.
UNEVEN = (3, 5, 8, 8, 12, 20, 20, 31, 55, 80, 140, 400)
EVEN = (200,) * 12


def weighted_mean_error(counts: Sequence[int], full_at: int, bits: int) -> tuple[float, float]:
    """Of the mean by integers beside the one in floats: root mean square, and its bound."""
    rng = np.random.default_rng(0)
    codec, spec = codec_named(f"grid:{bits},1.0"), ParamSpec.of({"a": np.zeros(4096, "f4")})
    assert isinstance(codec, SumCodec)
    total, sums = 0, np.zeros(4096, np.int64)
    exact, whole = np.zeros(4096), 0.0
    for number, samples in enumerate(counts):
        update = rng.standard_normal(4096)
        update *= 0.8 / np.linalg.norm(update)  # so short that none lies beyond the grid's range
        weight = weight_of_samples(samples, full_at)
        seeds = Seeds(shared=1, own=number)
        part = {"a": (update * (weight / FULL)).astype("f4")}
        sums += codec.quantise(part, seeds=seeds)
        total += weight
        share = min(samples, full_at) / full_at
        exact, whole = exact + share * update, whole + share
    mean = codec.mean(sums, len(counts), spec, seeds=Seeds(shared=1))["a"]
    error = mean * (len(counts) * FULL / total) - exact / whole
    # Rounding up or down by chance has a variance of at most a quarter of a step squared; the
    # weights' own rounding moves the mean by less than 1/65535 of each update's way to it.
    rounded = codec.step(spec) / 2 * len(counts) ** 0.5 / whole
    bound = rounded + 2 * 0.8 * len(counts) / FULL / whole / 4096**0.5
    return float(np.sqrt(np.mean(error**2))), bound


@pytest.mark.parametrize("bits", [4, 8, 12])
@pytest.mark.parametrize("counts", [EVEN, UNEVEN])
def test_the_weighted_mean_is_as_near_as_the_step_and_the_weights_allow(
    counts: Sequence[int], bits: int
) -> None:
    error, bound = weighted_mean_error(counts, 200, bits)
    assert bound / 4 < error < bound


def test_small_weights_cost_accuracy_in_proportion() -> None:
    """With the full weight ten times as high, weights and their sum are a tenth."""
    near, _ = weighted_mean_error(EVEN, 200, 8)
    far, _ = weighted_mean_error(EVEN, 2000, 8)
    assert 8 < far / near < 12
