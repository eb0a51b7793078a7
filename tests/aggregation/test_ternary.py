# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
import struct
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from aggregation.codecs import codec_named
from aggregation.codecs.codec import Codec
from aggregation.codecs.sparse_positions import Golomb
from aggregation.codecs.ternary import Ternary
from aggregation.codecs.top_k import TopK
from aggregation.errors import (
    CodecError,
    PayloadMalformedError,
    PayloadNotFiniteError,
    PayloadTooLongError,
    PayloadTruncatedError,
)
from protocol.tensors import ParamSpec

# few different values: ties everywhere
TIED = st.sampled_from([-3.0, -1.0, -0.0, 0.0, 1.0, 3.0])
ELEMENTS = st.one_of(st.floats(-1e6, 1e6, width=32), TIED)
VALUES = npst.arrays(np.float32, st.integers(1, 120), elements=ELEMENTS)
DENSITIES = st.sampled_from(["0.01", "0.05", "0.07", "0.1", "0.2", "0.3", "0.5", "0.9", "1.0"])
LIMIT = 1 << 24
LEAST = 2.0**-149  # between neighbours among the smallest float32


def slow_survivors(values: list[float], density: str) -> list[int]:
    """Exact top-k: the earlier of equal magnitudes."""
    count = math.ceil(Fraction(density) * len(values))
    return sorted(sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[:count])


def slow_ternary(values: list[float], density: str, scale: str, alpha: float) -> list[float]:
    """Dense, value by value."""
    chosen = slow_survivors(values, density)
    if scale == "mean":
        magnitude = math.fsum(abs(values[i]) for i in chosen) / len(chosen)
    else:
        mean = math.fsum(values) / len(values)
        magnitude = alpha * math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))
    dense = [0.0] * len(values)
    for i in chosen:
        dense[i] = magnitude if values[i] >= 0 else -magnitude
    return dense


def there_and_back(codec: Codec, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return codec.decode(codec.encode(tensors), ParamSpec.of(tensors), LIMIT)


@given(VALUES, DENSITIES, st.sampled_from([("std", 1.0), ("std", 2.5), ("mean", 1.0)]))
def test_decoded_values_are_those_of_the_slow_oracle(values, density, setting):
    scale, alpha = setting
    codec = Ternary(density=float(density), scale=scale, alpha=alpha)
    decoded = there_and_back(codec, {"a": values})["a"]
    expected = slow_ternary(values.tolist(), density, scale, alpha)
    tolerance = 1e-9 * float(np.abs(values).max()) + LEAST
    np.testing.assert_allclose(decoded, expected, rtol=3e-7, atol=tolerance)
    # whatever the magnitude is, positions and signs are exact
    if decoded.any():
        np.testing.assert_array_equal(np.sign(decoded), np.sign(expected))


@given(VALUES, DENSITIES)
def test_arguments_stay_as_they_are_and_payloads_within_their_bound(values, density):
    codec = Ternary(density=float(density))
    before = values.tobytes()
    payload = codec.encode({"a": values})
    assert values.tobytes() == before
    assert len(payload) <= codec.payload_bytes(ParamSpec.of({"a": values}))
    assert codec.encode({"a": values}) == payload


def test_tensors_are_one_vector_in_name_order_with_one_magnitude():
    rng = np.random.default_rng(0)
    tensors = {
        "b": rng.standard_normal((30, 4)).astype("f4"),
        "a": np.float32(10) * rng.standard_normal((5, 16)).astype("f4"),
        "c": np.array(-50, np.float32),
    }
    decoded = there_and_back(Ternary(density=0.2), tensors)
    assert ParamSpec.of(tensors).mismatch(decoded) is None
    vector = np.concatenate([tensors[name].reshape(-1) for name in "abc"])
    expected = slow_ternary(vector.tolist(), "0.2", "std", 1.0)
    flat = np.concatenate([decoded[name].reshape(-1) for name in "abc"])
    np.testing.assert_allclose(flat, expected, rtol=3e-7)
    assert np.count_nonzero(decoded["a"]) > 30 > np.count_nonzero(decoded["b"])


def test_the_magnitude_is_the_deviation_before_anything_is_dropped():
    values = np.array([3, -1, 1, -1, 1, -1, 1, -3], np.float32)
    for alpha in (1.0, 0.5, 4.0):
        decoded = there_and_back(Ternary(density=0.25, alpha=alpha), {"a": values})["a"]
        expected = np.float32(alpha * math.sqrt(3))  # (2·9 + 6·1) / 8
        assert decoded.tolist() == [expected, 0, 0, 0, 0, 0, 0, -expected]


def test_the_mean_is_that_of_magnitudes_not_of_signed_values():
    values = np.array([4, -2, 1, -1, 1, -1], np.float32)
    decoded = there_and_back(Ternary(density=0.33, scale="mean"), {"a": values})["a"]
    assert decoded.tolist() == [3, -3, 0, 0, 0, 0]


def test_exactly_k_survive_and_of_equal_magnitudes_the_earlier():
    values = np.array([1, -2, 2, -2, 2, 1], np.float32)
    decoded = there_and_back(Ternary(density=0.5, scale="mean"), {"a": values})["a"]
    assert decoded.tolist() == [0, -2, 2, -2, 0, 0]


def test_zeros_that_survive_count_as_positive():
    values = np.array([-8, 0.0, -0.0, 0, 0, 0, 0, 0], np.float32)
    decoded = there_and_back(Ternary(density=0.5, scale="mean"), {"a": values})["a"]
    assert decoded.tolist() == [-2, 2, 2, 2, 0, 0, 0, 0]


@pytest.mark.parametrize("value", [0.0, 0.1, -7.0])
def test_equal_values_have_no_deviation(value):
    values = np.full(1000, value, np.float32)
    np.testing.assert_allclose(there_and_back(Ternary(density=0.1), {"a": values})["a"], 0)
    decoded = there_and_back(Ternary(density=1, scale="mean"), {"a": values})["a"]
    np.testing.assert_array_equal(decoded, values)


def test_a_single_value_and_no_value_at_all():
    one = {"a": np.array(-3, np.float32)}
    assert there_and_back(Ternary(density=0.01), one)["a"] == 0
    assert there_and_back(Ternary(density=0.01, scale="mean"), one)["a"] == -3
    nothing = ParamSpec.of({})
    assert Ternary(density=0.1).encode({}) == b""
    assert Ternary(density=0.1).payload_bytes(nothing) == 0
    assert Ternary(density=0.1).decode(b"", nothing, 0) == {}
    with pytest.raises(PayloadTooLongError):
        Ternary(density=0.1).decode(b"\0", nothing, 0)


def entropy(size: int, count: int) -> float:
    """n·H(k/n) + k bits."""
    part = count / size
    return count - size * (part * math.log2(part) + (1 - part) * math.log2(1 - part))


def gaussian(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.standard_normal(size)


def laplace(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.laplace(size=size)


def clustered(rng: np.random.Generator, size: int) -> np.ndarray:
    """One tensor out of ten has changes ten times larger."""
    values = rng.standard_normal(size)
    values[size // 3 :][: size // 10] *= 10
    return values


def columns(rng: np.random.Generator, size: int) -> np.ndarray:
    """One column out of sixteen has: one rank of a LoRA factor."""
    values = rng.standard_normal(size)
    values[3::16] *= 10
    return values


def saturated(rng: np.random.Generator, size: int) -> np.ndarray:
    """Every ninth value, and nothing else: the gaps that cost most."""
    values = 0.01 * rng.standard_normal(size)
    values[::9] += 10
    return values


@pytest.mark.parametrize("draw", [gaussian, laplace, clustered, columns, saturated])
@pytest.mark.parametrize("density", [0.05, 0.1, 1 / 9, 0.2, 0.5])
@pytest.mark.parametrize(("size", "draws"), [(10_000, 5), (100_000, 2)])
def test_payloads_are_within_two_per_cent_of_the_entropy(draw, density, size, draws):
    for seed in range(draws):
        values = draw(np.random.default_rng(seed), size).astype(np.float32)
        bits = 8 * len(Ternary(density=density).encode({"a": values}))
        assert bits <= 1.02 * entropy(size, math.ceil(Fraction(repr(density)) * size))


def test_a_million_values_take_no_more_than_the_known_table():
    values = np.random.default_rng(3).standard_normal(1_000_000).astype(np.float32)
    # Golomb-Rice gaps and signs, bits a value
    for density, bits in ((0.05, 0.339), (0.1, 0.576), (0.2, 0.939), (0.5, 1.5001)):
        payload = Ternary(density=density).encode({"a": values})
        assert 8 * len(payload) / values.size <= bits
        decoded = Ternary(density=density).decode(payload, ParamSpec.of({"a": values}), LIMIT)["a"]
        assert np.count_nonzero(decoded) == round(density * values.size)
        least = np.abs(values[decoded != 0]).min()
        assert least >= np.abs(values[decoded == 0]).max()
        np.testing.assert_array_equal(np.sign(decoded)[decoded != 0], np.sign(values)[decoded != 0])


def test_known_bytes():
    values = np.array([0, 0, 4, 0, -4, 0, 0, 0, -4, 0, 0, 0, 0, 0, 0], np.float32)
    payload = Ternary(density=0.2, scale="mean").encode({"a": values})
    assert Golomb.of(15, 3).parameter == 3
    # 4.0; signs 1 0 0, flag 0, low bits 1 1 0, extra bits 1 0, quotients 1 1 01
    assert payload == struct.pack("<f", 4.0) + bytes([0b1011_0001, 0b0001_0110])


@pytest.mark.parametrize(
    ("codec", "name"),
    [
        (Ternary(density=0.1), "ternary:0.1"),
        (Ternary(density=1), "ternary:1.0"),
        (Ternary(density=0.1, scale="mean"), "ternary:0.1,mean"),
        (Ternary(density=1e-5, alpha=2), "ternary:1e-05,std,2.0"),
        (TopK(density=0.05), "top-k:0.05"),
    ],
)
def test_the_name_is_canonical_and_makes_the_same_codec(codec, name):
    assert codec.name == name
    assert codec_named(name) == codec


@pytest.mark.parametrize("density", [0, -0.1, 1.001, math.nan, math.inf, True, "0.1", None, 1j])
@pytest.mark.parametrize("kind", [Ternary, TopK])
def test_a_density_that_is_no_share_is_refused(kind, density):
    with pytest.raises(CodecError, match="density: expected a number above 0 up to 1"):
        kind(density=density)


@pytest.mark.parametrize("alpha", [0, -1, math.nan, math.inf, 10**400, 1e39, True, "2", None])
def test_an_alpha_that_cannot_scale_is_refused(alpha):
    with pytest.raises(CodecError, match="alpha: expected a float32 above 0"):
        Ternary(density=0.1, alpha=alpha)


def test_an_alpha_that_would_be_passed_over_is_refused():
    with pytest.raises(CodecError, match='alpha: expected 1 with scale "mean", found 2'):
        Ternary(density=0.1, scale="mean", alpha=2)


@pytest.mark.parametrize("scale", ["", "median", "Std", None, 1])
def test_a_scale_that_there_is_not_is_refused(scale):
    with pytest.raises(CodecError, match="scale: expected one of std, mean"):
        Ternary(density=0.1, scale=scale)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_encode_names_the_tensor_that_is_not_finite(value):
    tensors = {"a": np.ones(3, "f4"), "b": np.array([1, value], "f4")}
    with pytest.raises(PayloadNotFiniteError, match='tensor "b"'):
        Ternary(density=0.5).encode(tensors)


def test_encode_refuses_when_the_magnitude_is_beyond_float32():
    largest = np.finfo(np.float32).max
    values = np.array([largest, -largest], np.float32)
    np.testing.assert_array_equal(there_and_back(Ternary(density=1), {"a": values})["a"], values)
    with pytest.raises(PayloadNotFiniteError, match=r"1\.5 times the standard deviation"):
        Ternary(density=1, alpha=1.5).encode({"a": values})


def hostile(scale: float) -> tuple[bytes, ParamSpec]:
    values = np.random.default_rng(1).standard_normal(50).astype(np.float32)
    payload = Ternary(density=0.1).encode({"a": values})
    return struct.pack("<f", scale) + payload[4:], ParamSpec.of({"a": values})


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf])
def test_decode_refuses_a_magnitude_that_is_not_finite(scale):
    payload, spec = hostile(scale)
    with pytest.raises(PayloadNotFiniteError, match="scale"):
        Ternary(density=0.1).decode(payload, spec, LIMIT)


@pytest.mark.parametrize("scale", [-1.0, -0.0, -1e-45])
def test_decode_refuses_a_negative_magnitude(scale):
    payload, spec = hostile(scale)
    with pytest.raises(PayloadMalformedError, match="scale: expected 0 or more"):
        Ternary(density=0.1).decode(payload, spec, LIMIT)


def test_what_decodes_has_k_survivors_or_is_refused():
    payload, spec = hostile(1.0)
    accepted = 0
    for bit in range(32, 8 * len(payload)):
        flipped = bytearray(payload)
        flipped[bit // 8] ^= 1 << (bit % 8)
        try:
            decoded = Ternary(density=0.1).decode(flipped, spec, LIMIT)["a"]
        except CodecError:
            continue
        accepted += 1
        assert np.count_nonzero(decoded) == 5
        assert set(np.abs(decoded).tolist()) == {0.0, 1.0}
    assert accepted > 5, "signs can be flipped, at least"


def test_decode_refuses_every_cut_and_every_addition():
    payload, spec = hostile(1.0)
    for end in range(len(payload)):
        with pytest.raises(PayloadTruncatedError):
            Ternary(density=0.1).decode(payload[:end], spec, LIMIT)
    for more in (b"\0", b"\1", bytes(1000)):
        with pytest.raises(PayloadTooLongError):
            Ternary(density=0.1).decode(payload + more, spec, LIMIT)
