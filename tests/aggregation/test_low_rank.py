# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from aggregation import CodecError, PayloadNotFiniteError
from aggregation.codecs import low_rank
from aggregation.codecs.low_rank import LowRank
from protocol import ParamSpec

ELEMENTS = st.floats(-1e6, 1e6, width=32)
MATRICES = npst.array_shapes(min_dims=2, max_dims=2, min_side=3, max_side=9).flatmap(
    lambda shape: npst.arrays(np.float32, shape, elements=ELEMENTS)
)


def round_trip(codec: LowRank, values: np.ndarray) -> np.ndarray:
    spec = ParamSpec.of({"a": values})
    return codec.decode(codec.encode({"a": values}), spec, spec.nbytes)["a"]


def factors(codec: LowRank, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    numbers = np.frombuffer(codec.encode({"a": values}), "<f4")
    rows, columns = values.shape
    left, right = np.split(numbers, [rows * codec.rank])
    return left.reshape(rows, codec.rank), right.reshape(codec.rank, columns)


def slow_product(left: np.ndarray, right: np.ndarray) -> list[list[float]]:
    """Entry by entry, the sum over the rank in order, rounded once."""
    product = []
    for row in left.tolist():
        product.append([])
        for column in right.T.tolist():
            total = 0.0
            for a, b in zip(row, column, strict=True):
                total += a * b
            product[-1].append(float(np.float32(total)))
    return product


@given(MATRICES, st.integers(1, 4))
def test_the_residual_is_the_least_that_the_rank_allows(values, rank):
    codec = LowRank(rank=rank)
    decoded = round_trip(codec, values)
    if rank * sum(values.shape) >= values.size:
        np.testing.assert_array_equal(decoded, values)
        return
    singular = np.linalg.svd(values.astype(np.float64), compute_uv=False)
    least = math.sqrt(np.square(singular[rank:]).sum())
    scale = float(singular[0])
    residual = np.linalg.norm(values.astype(np.float64) - decoded)
    assert residual == pytest.approx(least, rel=1e-6, abs=3e-6 * scale + 1e-30)
    kept = np.linalg.svd(decoded.astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(kept[:rank], singular[:rank], rtol=1e-6, atol=3e-6 * scale + 1e-30)
    np.testing.assert_allclose(kept[rank:], 0, atol=3e-6 * scale + 1e-30)


def test_the_residual_is_what_the_spectrum_of_the_gram_matrix_leaves():
    values = np.random.default_rng(0).standard_normal((30, 20)).astype("f4")
    wide = values.astype(np.float64)
    spectrum = np.linalg.eigvalsh(wide.T @ wide)  # ascending
    for rank in (1, 3, 8):
        residual = np.square(wide - round_trip(LowRank(rank=rank), values)).sum()
        assert residual == pytest.approx(spectrum[:-rank].sum(), rel=1e-6)


@given(MATRICES)
def test_decoding_is_the_slow_product_bit_for_bit(values):
    codec = LowRank(rank=1)
    expected = slow_product(*factors(codec, values))
    assert round_trip(codec, values).tolist() == expected


@pytest.mark.parametrize("shape", [(40, 25), (25, 40), (3, 200), (200, 3)])
@pytest.mark.parametrize("block", [1, 7, 64, 1 << 16])
def test_blocks_do_not_show_in_the_bits(shape, block, monkeypatch):
    monkeypatch.setattr(low_rank, "_BLOCK", block)
    codec = LowRank(rank=2)
    values = np.random.default_rng(1).standard_normal(shape).astype("f4")
    assert round_trip(codec, values).tolist() == slow_product(*factors(codec, values))


def test_matrices_wider_than_a_block_are_whole():
    values = np.outer(np.arange(1, 4), np.arange(1, 70_001)).astype("f4")
    np.testing.assert_allclose(round_trip(LowRank(rank=1), values), values, rtol=1e-6)


def test_a_matrix_of_that_rank_is_itself():
    rng = np.random.default_rng(2)
    values = (rng.standard_normal((50, 3)) @ rng.standard_normal((3, 40))).astype("f4")
    np.testing.assert_allclose(round_trip(LowRank(rank=3), values), values, atol=3e-6)
    zeros = np.zeros((9, 9), "f4")
    np.testing.assert_array_equal(round_trip(LowRank(rank=2), zeros), zeros)


def test_factors_are_balanced_and_signed_by_the_largest_entry_of_the_left():
    values = np.random.default_rng(3).standard_normal((12, 9)).astype("f4")
    left, right = factors(LowRank(rank=3), values)
    singular = np.linalg.svd(values.astype(np.float64), compute_uv=False)[:3]
    np.testing.assert_allclose(left.T @ left, np.diag(singular), atol=1e-5)
    np.testing.assert_allclose(right @ right.T, np.diag(singular), atol=1e-5)
    assert (left[np.abs(left).argmax(axis=0), range(3)] > 0).all()
    mirrored = factors(LowRank(rank=3), -values)
    np.testing.assert_allclose(mirrored[0], left, atol=1e-5)
    np.testing.assert_allclose(mirrored[1], -right, atol=1e-5)


def test_only_matrices_that_become_smaller_are_split():
    rng = np.random.default_rng(4)
    shapes = {"b": (4, 4), "c": (5, 4), "d": (8,), "e": (4, 4, 4), "f": (), "g": (30, 1)}
    tensors = {name: rng.standard_normal(shape).astype("f4") for name, shape in shapes.items()}
    spec = ParamSpec.of(tensors)
    codec = LowRank(rank=2)
    payload = codec.encode(tensors)
    plain = sum(array.size for name, array in tensors.items() if name != "c")
    assert len(payload) == codec.payload_bytes(spec) == 4 * (plain + 2 * (5 + 4))
    decoded = codec.decode(payload, spec, spec.nbytes)
    for name, array in tensors.items():
        assert np.array_equal(decoded[name], array) == (name != "c")
    # name order, and nothing shared between tensors
    assert payload == b"".join(codec.encode({name: tensors[name]}) for name in sorted(tensors))


def test_magnitudes_at_both_ends_of_float32():
    small = np.full((6, 6), 1e-44, "f4")
    np.testing.assert_array_equal(round_trip(LowRank(rank=1), small), small)
    large = np.zeros((6, 6), "f4")
    large[2, 3] = -3.39e38
    np.testing.assert_allclose(round_trip(LowRank(rank=1), large), large, rtol=1e-6)
    with pytest.raises(PayloadNotFiniteError, match=r'tensor "big": .* found 6e\+38'):
        LowRank(rank=1).encode({"a": small, "big": np.full((6, 6), 1e38, "f4")})


SPEC = ParamSpec.of({"a": np.zeros((3, 4), "f4"), "b": np.zeros(1, "f4")})


@pytest.mark.parametrize("place", range(8))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("others", [0.0, 1.0])
def test_decode_refuses_when_a_factor_or_a_plain_value_is_not_finite(place, value, others):
    numbers = np.full(8, others, "<f4")
    numbers[place] = value
    with pytest.raises(PayloadNotFiniteError, match=f'tensor "{"a" if place < 7 else "b"}"'):
        LowRank(rank=1).decode(numbers.tobytes(), SPEC, 1000)


def test_decode_refuses_when_a_product_is_beyond_float32():
    numbers = np.array([1e20, 0, 0, 0, 0, 0, -1e20, 0], "<f4")
    with pytest.raises(PayloadNotFiniteError, match=r'tensor "a": .* found 1 NaN'):
        LowRank(rank=1).decode(numbers.tobytes(), SPEC, 1000)
    numbers[6] = -1e18
    assert LowRank(rank=1).decode(numbers.tobytes(), SPEC, 1000)["a"][0, 3] == np.float32(-1e38)


@pytest.mark.parametrize("rank", [0, -1, 1.0, True, "2", None])
def test_settings_are_refused_when_the_rank_is_not_1_or_more(rank):
    with pytest.raises(CodecError, match="rank: expected an integer of 1 or more"):
        LowRank(rank=rank)


def test_the_name_holds_the_rank():
    assert LowRank(rank=2).name == "low-rank:2"
