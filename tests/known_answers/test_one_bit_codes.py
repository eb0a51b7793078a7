# SPDX-License-Identifier: Apache-2.0
"""The one-bit code points, from the recurrence of the paper and from published digits."""

from __future__ import annotations

from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pytest

from aggregation import OneBit
from aggregation.codecs.one_bit import CODE
from protocol import ParamSpec


def k_medians(bits: int) -> list[float]:
    """Jie et al. 2023: each code is the median of its cell, each boundary halves its codes."""
    normal = NormalDist()
    codes = [0.0] * 2**bits
    for _ in range(500):
        inner = [(low + high) / 2 for low, high in pairwise(codes)]
        below = [0.0, *(normal.cdf(r) for r in inner)]
        above = [*(normal.cdf(r) for r in inner), 1.0]
        codes = [normal.inv_cdf((b + a) / 2) for b, a in zip(below, above, strict=True)]
    return codes


def test_the_code_is_the_published_k_median():
    assert k_medians(1) == pytest.approx([-CODE, CODE], abs=1e-15)
    assert round(CODE, 4) == 0.6745
    assert NormalDist().inv_cdf(0.75) == pytest.approx(CODE, abs=1e-15)


def test_the_recurrence_gives_the_published_two_bit_codes():
    assert [round(code, 4) for code in k_medians(2)] == [-1.2657, -0.3778, 0.3778, 1.2657]


def test_a_tensor_has_these_bytes():
    # mean 0.5, unbiased deviation √(32 · 0.25 / 31); every second value is 1, with bit 1
    values = np.zeros(32, np.float32)
    values[::2] = 1.0
    payload = OneBit().encode({"a": values})
    assert payload.hex() == "0000003f" + "520c023f" + "55555555"
    decoded = OneBit().decode(payload, ParamSpec.of({"a": values}), 128)["a"]
    np.testing.assert_array_equal(decoded[:2], np.array([0.84264114, 0.15735887], np.float32))


def test_bits_are_packed_lowest_first_and_the_mean_itself_counts_as_above():
    values = np.zeros(33, np.float32)
    values[[0, 9]] = [-1.0, 1.0]  # mean 0: all but the first are not below it
    assert OneBit().encode({"a": values})[8:].hex() == "feffffff01"


def test_the_size_of_bi_adaptformer_is_the_published_one():
    # ViT-B/16, 12 blocks, width 32: 73,920 bytes, as the files that the authors ship
    adapters = {
        f"{block}.{name}": np.zeros(shape, np.float32)
        for block in range(12)
        for name, shape in (("down", (32, 768)), ("up", (768, 32)))
    }
    assert OneBit().payload_bytes(ParamSpec.of(adapters)) == 73_920
