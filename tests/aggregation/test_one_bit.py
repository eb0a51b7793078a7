# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from aggregation import OneBit, PayloadMalformedError, PayloadNotFiniteError
from aggregation.codecs.one_bit import CODE, MIN_VALUES
from protocol import ParamSpec

ELEMENTS = st.floats(-1e6, 1e6, width=32)


def slow_encode(values: list[float]) -> bytes:
    """The format, value by value."""
    n = len(values)
    if n < MIN_VALUES:
        return b"".join(struct.pack("<f", value) for value in values)
    mean = math.fsum(values) / n
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    (mean_single,) = struct.unpack("<f", struct.pack("<f", mean))
    packed = bytearray((n + 7) // 8)
    for i, value in enumerate(values):
        if value >= mean_single:
            packed[i // 8] |= 1 << (i % 8)
    return struct.pack("<ff", mean, std) + bytes(packed)


def slow_decode(payload: bytes, n: int) -> list[float]:
    if n < MIN_VALUES:
        return list(struct.unpack(f"<{n}f", payload))
    mean, std = struct.unpack_from("<ff", payload)
    signs = [1 if payload[8 + i // 8] >> (i % 8) & 1 else -1 for i in range(n)]
    return [float(np.float32(mean + sign * CODE * std)) for sign in signs]


@given(npst.arrays(np.float32, st.integers(1, 90), elements=ELEMENTS))
def test_encode_and_decode_are_those_of_the_slow_oracle(values):
    payload = OneBit().encode({"a": values})
    slow = slow_encode(values.tolist())
    assert len(payload) == len(slow)
    if values.size < MIN_VALUES:
        assert payload == slow
    else:
        # sums in another order may differ in the last bit of a float32 scalar
        fast_scalars, slow_scalars = (np.frombuffer(p, "<f4", count=2) for p in (payload, slow))
        scale = np.abs(values).max()
        tolerance = 1e-12 * scale + 2.0**-149  # that between neighbours among the smallest
        np.testing.assert_allclose(fast_scalars, slow_scalars, rtol=3e-7, atol=tolerance)
        near = np.abs(values - slow_scalars[0]) <= 1e-6 * scale
        bits = [
            np.unpackbits(np.frombuffer(p, np.uint8, offset=8), bitorder="little")[: values.size]
            for p in (payload, slow)
        ]
        np.testing.assert_array_equal(bits[0][~near], bits[1][~near])
    decoded = OneBit().decode(payload, ParamSpec.of({"a": values}), 1000)["a"]
    assert decoded.tolist() == slow_decode(payload, values.size)


def test_several_tensors_follow_one_another_in_name_order():
    rng = np.random.default_rng(1)
    tensors = {n: rng.standard_normal(s).astype("f4") for n, s in (("b", 77), ("a", 31), ("c", 32))}
    payload = OneBit().encode(tensors)
    assert payload == b"".join(OneBit().encode({n: tensors[n]}) for n in sorted(tensors))
    decoded = OneBit().decode(payload, ParamSpec.of(tensors), 1000)
    np.testing.assert_array_equal(decoded["a"], tensors["a"])
    assert len(set(decoded["b"].tolist())) == 2


def test_a_constant_tensor_stays_what_it_is():
    tensors = {"a": np.full((8, 8), 0.1, np.float32)}
    decoded = OneBit().decode(OneBit().encode(tensors), ParamSpec.of(tensors), 1000)
    np.testing.assert_array_equal(decoded["a"], tensors["a"])


def test_error_on_normal_values_is_that_of_the_code():
    # E (|z| - 0.6745)² = 1 + 0.6745² - 2 · 0.6745 · √(2/π) = 0.3787
    values = np.random.default_rng(2).normal(0.5, 2.0, 200_000).astype(np.float32)
    decoded = OneBit().decode(OneBit().encode({"a": values}), ParamSpec.of({"a": values}), 1 << 20)
    assert np.square((decoded["a"] - values) / 2).mean() == pytest.approx(0.3787, abs=0.01)


def scalars(mean: float, std: float) -> bytes:
    return np.array([mean, std], "<f4").tobytes()


SPEC_37 = ParamSpec.of({"a": np.zeros(37, "f4")})


@pytest.mark.parametrize(
    ("mean", "std"),
    [(np.nan, 1), (0, np.nan), (np.inf, 1), (0, np.inf), (-np.inf, 1), (3e38, 3e38), (-3e38, 3e38)],
)
def test_decode_refuses_when_scalars_give_no_finite_values(mean, std):
    with pytest.raises(PayloadNotFiniteError, match='tensor "a"'):
        OneBit().decode(scalars(mean, std) + bytes(5), SPEC_37, 1000)


@pytest.mark.parametrize("std", [-1.0, -0.0])
def test_decode_refuses_when_the_deviation_is_negative(std):
    with pytest.raises(PayloadMalformedError, match="0 or more"):
        OneBit().decode(scalars(0, std) + bytes(5), SPEC_37, 1000)


@pytest.mark.parametrize("bit", [5, 6, 7])
def test_decode_refuses_when_an_unused_bit_is_set(bit):
    with pytest.raises(PayloadMalformedError, match="unused bits"):
        OneBit().decode(scalars(0, 1) + bytes(4) + bytes([1 << bit]), SPEC_37, 1000)


def test_decode_refuses_when_a_small_tensor_is_not_finite():
    spec = ParamSpec.of({"a": np.zeros(2, "f4")})
    with pytest.raises(PayloadNotFiniteError, match="found 1 NaN"):
        OneBit().decode(np.array([1, np.nan], "<f4").tobytes(), spec, 1000)


def test_encode_refuses_when_the_codes_would_overflow():
    values = np.full(32, 3.4e38, np.float32)
    values[::2] *= -1
    with pytest.raises(PayloadNotFiniteError, match='tensor "a"'):
        OneBit().encode({"a": values})
