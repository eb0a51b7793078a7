# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.counter_rng import ROTATION, words
from aggregation.rotation import power_below, rotate, rotate_back

SEEDS = st.integers(0, 2**64 - 1)


def slow_rotation(size: int, seed: int) -> np.ndarray:
    """The matrix [size, size], by the definition: signs, then Hadamard, on either end."""
    power = power_below(size)
    places = range(power)
    hadamard = [[(-1) ** (i & j).bit_count() for j in places] for i in places]
    block = np.array(hadamard) / math.sqrt(power)

    def signs(stream: int) -> np.ndarray:
        drawn = words(seed, ROTATION, [stream], 0, (size + 31) // 32)[0].tolist()
        return np.diag([-1.0 if drawn[i // 32] >> i % 32 & 1 else 1.0 for i in range(size)])

    whole = np.eye(size)
    whole[:power, :power] = block
    whole = whole @ signs(0)
    if power < size:
        last = np.eye(size)
        last[size - power :, size - power :] = block
        whole = last @ signs(1) @ whole
    return whole


@given(size=st.integers(1, 70), seed=SEEDS)
def test_it_is_the_matrix_and_its_transpose(size: int, seed: int) -> None:
    vector = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    matrix = slow_rotation(size, seed)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-12)
    turned = vector.copy()
    rotate(turned, seed)
    np.testing.assert_allclose(turned, matrix @ vector, atol=1e-5)
    rotate_back(turned, seed)
    np.testing.assert_allclose(turned, vector, atol=1e-5)


@pytest.mark.parametrize("size", [1 << 17, (1 << 17) + 1, 200_001])
def test_blocks_join(size: int) -> None:
    """A value alone at each end reaches as far as the matrix says, whatever the block."""
    for place in (0, size - 1):
        vector = np.zeros(size, np.float32)
        vector[place] = 1
        rotate(vector, 7)
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-4)
        assert np.abs(vector).max() <= 6 / math.sqrt(power_below(size))
        rotate_back(vector, 7)
        assert vector[place] == pytest.approx(1, abs=1e-4)
        assert np.abs(np.delete(vector, place)).max() < 1e-5


@pytest.mark.parametrize("size", [4096, 5000])
def test_values_are_about_normal_however_the_vector_looks(size: int) -> None:
    spike = np.zeros(size, np.float32)
    spike[:3] = 1, -2, 2  # norm 3
    sigma = 3 / math.sqrt(power_below(size))
    drawn = []
    for seed in range(40):
        vector = spike.copy()
        rotate(vector, seed)
        drawn.append(vector)
    every = np.concatenate(drawn).astype(np.float64) / sigma
    assert every.std() <= 1.001
    assert (np.abs(every) > 4.5).mean() < 1e-4
    assert not np.array_equal(drawn[0], drawn[1]), "each seed has its own"


def test_known_bits() -> None:
    vector = np.arange(1, 7, dtype=np.float32)
    rotate(vector, 0)
    assert vector.astype("<f4").tobytes().hex() == KNOWN


KNOWN = "000000c000000000000008410000c03f000020c000002040"
