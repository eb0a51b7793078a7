# SPDX-License-Identifier: Apache-2.0
"""What holds for integers of 8 bits and of 4; their bytes are in the tests of each."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from aggregation import CodecError, PayloadMalformedError, PayloadNotFiniteError, Seeds
from aggregation.codecs import quantised
from aggregation.codecs.int4 import Int4
from aggregation.codecs.int8 import Int8
from protocol import ParamSpec

BITS = {"int8": 8, "int8:channel": 8, "int4": 4, "int4:channel": 4}
CODECS = [Int8(), Int8(per_channel=True), Int4(), Int4(per_channel=True)]
ANY = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
PER_TENSOR = pytest.mark.parametrize("codec", [Int8(), Int4()], ids=lambda codec: codec.name)
PER_CHANNEL = pytest.mark.parametrize(
    "codec", [Int8(per_channel=True), Int4(per_channel=True)], ids=lambda codec: codec.name
)
ELEMENTS = st.floats(-1e6, 1e6, width=32) | st.floats(-(2.0**-140), 2.0**-140, width=32)
SHAPES = npst.array_shapes(min_dims=0, max_dims=3, max_side=6)
ARRAYS = SHAPES.flatmap(lambda shape: npst.arrays(np.float32, shape, elements=ELEMENTS))
LARGEST = float(np.finfo(np.float32).max)


def slow_decode(payload: bytes, shape: tuple[int, ...], name: str) -> tuple[list, list]:
    """The format, value by value: (scale, integer) or (None, value), and how they decode."""
    size, bits = math.prod(shape), BITS[name]
    channels = shape[0] if name.endswith(":channel") and len(shape) > 1 else 1
    width = math.ceil(size * bits / 8)
    if 4 * channels + width >= 4 * size:
        values = struct.unpack(f"<{size}f", payload)
        return [(None, value) for value in values], list(values)
    assert len(payload) == 4 * channels + width
    scales = struct.unpack_from(f"<{channels}f", payload)
    pairs, decoded = [], []
    for i in range(size):
        byte = payload[4 * channels + i * bits // 8]
        unsigned = byte if bits == 8 else byte >> 4 if i % 2 else byte & 15
        integer = unsigned - (1 << bits) if unsigned >> (bits - 1) else unsigned
        scale = scales[i // (size // channels)]
        pairs.append((scale, integer))
        decoded.append(float(np.float32(integer * scale)))
    return pairs, decoded


def round_trip(codec, values: np.ndarray, own: int = 0) -> np.ndarray:
    spec = ParamSpec.of({"a": values})
    payload = codec.encode({"a": values}, seeds=Seeds(own=own))
    return codec.decode(payload, spec, spec.nbytes)["a"]


@ANY
@given(values=ARRAYS, own=st.integers(0, 2**64 - 1))
def test_values_become_one_of_the_two_integers_beside_them(codec, values, own):
    payload = codec.encode({"a": values}, seeds=Seeds(own=own))
    pairs, decoded = slow_decode(payload, values.shape, codec.name)
    for value, (scale, integer) in zip(values.reshape(-1).tolist(), pairs, strict=True):
        if scale is None or scale == 0:
            assert value == integer
        else:
            exact = Fraction(value) / Fraction(scale)
            assert integer in (math.floor(exact), math.ceil(exact))
    spec = ParamSpec.of({"a": values})
    found = codec.decode(payload, spec, spec.nbytes)["a"]
    assert found.shape == values.shape
    assert found.reshape(-1).tolist() == decoded


@PER_TENSOR
@given(values=npst.arrays(np.float32, st.integers(2, 9), elements=ELEMENTS))
def test_the_scale_is_the_least_float32_that_reaches_the_largest_magnitude(codec, values):
    levels = {8: 127, 4: 7}[BITS[codec.name]]
    (scale,) = struct.unpack_from("<f", codec.encode({"a": values}))
    largest = Fraction(float(np.abs(values).max()))
    assert levels * Fraction(scale) >= largest
    if scale:
        below = float(np.nextafter(np.float32(scale), np.float32(0)))
        assert levels * Fraction(below) < largest


@PER_CHANNEL
def test_a_channel_has_the_scale_that_it_would_have_alone(codec):
    values = np.random.default_rng(0).standard_normal((5, 3, 4)).astype("f4")
    values *= np.array([1, 1e-3, 0, 1e4, 7], "f4")[:, None, None]
    scales = np.frombuffer(codec.encode({"a": values}), "<f4", count=5)
    alone = [codec.encode({"a": channel.reshape(-1)})[:4] for channel in values]
    assert scales.tobytes() == b"".join(alone)
    assert scales[2] == 0
    np.testing.assert_array_equal(round_trip(codec, values)[2], 0)


@PER_CHANNEL
def test_channels_of_one_value_are_written_as_they_are(codec):
    values = np.random.default_rng(0).standard_normal((40, 1)).astype("f4")
    assert codec.encode({"a": values}) == values.tobytes()
    assert len(codec.encode({"a": values.T})) < values.nbytes


@ANY
def test_vectors_have_one_scale_and_single_values_none(codec):
    plain = Int8() if BITS[codec.name] == 8 else Int4()
    tensors = {"a": np.array(0.3, "f4"), "b": np.array([0.7], "f4"), "c": np.ones(9, "f4")}
    payload = codec.encode(tensors)
    assert payload == plain.encode(tensors)
    assert payload[:8] == np.array([0.3, 0.7], "<f4").tobytes()
    assert len(payload) == 8 + 4 + (9 if BITS[codec.name] == 8 else 5)


@ANY
def test_the_expected_value_is_the_value(codec):
    values = np.random.default_rng(1).normal(0, 1, (4, 12)).astype("f4")
    runs = 3000
    total = np.zeros(values.shape)
    for own in range(runs):
        total += round_trip(codec, values, own)
    scale = np.abs(values).max() / (127 if BITS[codec.name] == 8 else 7)
    # one rounding has a deviation of at most half a step
    assert np.abs(total / runs - values).max() < 5 * scale / 2 / math.sqrt(runs)


@ANY
def test_each_value_is_rounded_by_a_draw_of_its_own(codec):
    # 0.3 of a step above an integer: up three times of ten, wherever it stands
    levels = 127 if BITS[codec.name] == 8 else 7
    values = np.full((2, 150_001), 1.3, np.float32)
    values[:, 0] = levels
    up = round_trip(codec, values)[:, 1:] - 1
    assert set(np.unique(up).tolist()) == {0.0, 1.0}
    for part in (up[0], up[1], up[:, ::2], up[:, 1::2], up[:, -40_000:]):
        assert abs(part.mean() - 0.3) < 5 * math.sqrt(0.21 / part.size)
    assert abs((up[:, 1:] * up[:, :-1]).mean() - 0.09) < 0.005
    assert abs((up[0] * up[1]).mean() - 0.09) < 0.005


@ANY
def test_rounding_follows_from_the_client_s_own_seed_alone(codec):
    tensors = {"a": np.random.default_rng(2).standard_normal((3, 50)).astype("f4")}
    first = codec.encode(tensors, seeds=Seeds(own=1, shared=1))
    assert codec.encode(tensors, seeds=Seeds(own=1, shared=2)) == first
    assert codec.encode(tensors, seeds=Seeds(own=2, shared=1)) != first
    spec = ParamSpec.of(tensors)
    decoded = codec.decode(first, spec, 1000)["a"]
    other = codec.decode(first, spec, 1000, seeds=Seeds(own=9, shared=9))["a"]
    np.testing.assert_array_equal(decoded, other)


@ANY
def test_long_tensors_are_worked_out_in_blocks_that_do_not_show(codec, monkeypatch):
    tensors = {"a": np.random.default_rng(3).standard_normal((7, 101)).astype("f4")}
    payload = codec.encode(tensors)
    decoded = codec.decode(payload, ParamSpec.of(tensors), 4000)["a"]
    monkeypatch.setattr(quantised, "_BLOCK", 64)
    assert codec.encode(tensors) == payload
    again = codec.decode(payload, ParamSpec.of(tensors), 4000)["a"]
    np.testing.assert_array_equal(again, decoded)
    assert decoded.reshape(-1).tolist() == slow_decode(payload, (7, 101), codec.name)[1]


@ANY
def test_zeros_of_both_signs_have_the_scale_0(codec):
    values = np.array([[0.0, -0.0, 0.0], [-0.0, -0.0, -0.0]], "f4")
    payload = codec.encode({"a": values}, seeds=Seeds(own=3))
    assert payload == bytes(len(payload))
    np.testing.assert_array_equal(round_trip(codec, values), 0)


@ANY
def test_values_near_the_end_of_float32_decode_or_are_refused_by_name(codec):
    values = np.array([[3.4e38, -3.4e38, 1]], "f4")
    assert np.abs(round_trip(codec, values)).max() == pytest.approx(3.4e38)
    for value in (LARGEST, -LARGEST):
        tensors = {"a": np.ones(4, "f4"), "big": np.array([[0, 1], [value, 1]], "f4")}
        if BITS[codec.name] == 4:  # a seventh of the largest float32 is a float32
            assert round_trip(codec, tensors["big"])[1, 0] == value
        else:
            with pytest.raises(PayloadNotFiniteError, match=r'tensor "big": .* beyond float32'):
                codec.encode(tensors)


def hostile(codec, scales: list[float], integers: bytes) -> dict[str, np.ndarray]:
    """Decoded as tensor "a" of two channels of five values."""
    spec = ParamSpec.of({"a": np.zeros((2, 5), "f4")})
    return codec.decode(np.array(scales, "<f4").tobytes() + integers, spec, 1000)


@PER_CHANNEL
@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf])
def test_decode_refuses_when_a_scale_is_not_finite(codec, scale):
    with pytest.raises(PayloadNotFiniteError, match=r'tensor "a": .* found 1 NaN'):
        hostile(codec, [1, scale], bytes(10 if BITS[codec.name] == 8 else 5))


@PER_CHANNEL
@pytest.mark.parametrize("scale", [-1.0, -0.0, -1e-45])
def test_decode_refuses_when_a_scale_is_negative(codec, scale):
    with pytest.raises(PayloadMalformedError, match=r'tensor "a": expected scales of 0 or more'):
        hostile(codec, [scale, 1], bytes(10 if BITS[codec.name] == 8 else 5))


@PER_CHANNEL
def test_decode_refuses_when_a_product_is_beyond_float32(codec):
    one_three = b"\x03" + bytes(9) if BITS[codec.name] == 8 else b"\x03" + bytes(4)
    with pytest.raises(PayloadNotFiniteError, match='tensor "a"'):
        hostile(codec, [3e38, 0], one_three)


@pytest.mark.parametrize("made", [Int8, Int4])
@pytest.mark.parametrize("flag", [1, 0, None, "channel"])
def test_settings_are_refused_when_they_are_no_flags(made, flag):
    with pytest.raises(CodecError, match="per_channel: expected true or false"):
        made(per_channel=flag)


def test_names_hold_the_setting():
    assert [codec.name for codec in CODECS] == list(BITS)
