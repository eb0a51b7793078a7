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

from aggregation.codecs.top_k import TopK, largest, survivors
from aggregation.errors import (
    CodecError,
    PayloadNotFiniteError,
    PayloadTooLongError,
    PayloadTruncatedError,
)
from protocol.tensors import ParamSpec

# few different values: ties everywhere
TIED = st.sampled_from([-3.0, -1.0, -0.0, 0.0, 1.0, 3.0])
ELEMENTS = st.one_of(st.floats(width=32, allow_nan=False, allow_infinity=False), TIED)
VALUES = npst.arrays(np.float32, st.integers(1, 120), elements=ELEMENTS)
DENSITIES = st.sampled_from(["0.01", "0.05", "0.07", "0.1", "0.2", "0.3", "0.5", "0.9", "1.0"])
LIMIT = 1 << 24


def slow_survivors(values: list[float], density: str) -> list[int]:
    """Exact top-k: the earlier of equal magnitudes."""
    count = math.ceil(Fraction(density) * len(values))
    return sorted(sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[:count])


@given(VALUES, DENSITIES)
def test_survivors_come_back_bit_for_bit_among_zeros(values, density):
    codec = TopK(density=float(density))
    before = values.tobytes()
    payload = codec.encode({"a": values})
    spec = ParamSpec.of({"a": values})
    decoded = codec.decode(payload, spec, spec.nbytes)["a"]
    expected = np.zeros_like(values)
    chosen = slow_survivors(values.tolist(), density)
    expected[chosen] = values[chosen]
    assert decoded.tobytes() == expected.tobytes()
    assert values.tobytes() == before
    assert 4 * len(chosen) < len(payload) <= codec.payload_bytes(spec)


@given(VALUES, st.data())
def test_largest_is_the_slow_selection(values, data):
    count = data.draw(st.integers(1, values.size))
    order = sorted(range(values.size), key=lambda i: (-abs(float(values[i])), i))
    assert largest(values, count).tolist() == sorted(order[:count])


@pytest.mark.parametrize(
    ("density", "size", "count"),
    [(0.07, 100, 7), (0.1, 3, 1), (0.1, 30, 3), (1.0, 9, 9), (0.29, 100, 29), (1e-9, 5, 1)],
)
def test_the_count_is_that_of_the_decimal_that_was_written(density, size, count):
    assert survivors(density, size) == count


def test_half_of_a_million_values_come_back():
    values = np.random.default_rng(0).standard_normal(1_000_000).astype(np.float32)
    tensors = {"b": values[:400_000].reshape(400, 1000), "a": values[400_000:]}
    spec = ParamSpec.of(tensors)
    for density in (0.003, 0.2, 0.5):
        decoded = TopK(density=density).decode(TopK(density=density).encode(tensors), spec, LIMIT)
        flat, found = spec.flatten(tensors), spec.flatten(decoded)
        kept = found != 0
        assert np.count_nonzero(kept) == round(density * values.size)
        np.testing.assert_array_equal(found[kept], flat[kept])
        assert np.abs(flat[kept]).min() >= np.abs(flat[~kept]).max()


def test_known_bytes():
    values = np.array([0, 0, 4, 0, -5, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0], np.float32)
    # flag 0, low bits 1 1 0, extra bits 1 0, quotients 1 1 01
    expected = struct.pack("<3f", 4, -5, 6) + bytes([0b1101_0110, 0b0000_0010])
    assert TopK(density=0.2).encode({"a": values}) == expected


def test_nothing_to_send():
    codec, nothing = TopK(density=0.1), ParamSpec.of({})
    assert codec.encode({}) == b""
    assert codec.payload_bytes(nothing) == 0
    assert codec.decode(b"", nothing, 0) == {}
    with pytest.raises(PayloadTooLongError):
        codec.decode(b"\0", nothing, 0)


def test_decode_refuses_every_cut_and_every_addition():
    values = np.random.default_rng(1).standard_normal(50).astype(np.float32)
    codec, spec = TopK(density=0.1), ParamSpec.of({"a": values})
    payload = codec.encode({"a": values})
    for end in range(len(payload)):
        with pytest.raises(PayloadTruncatedError):
            codec.decode(payload[:end], spec, LIMIT)
    for more in (b"\0", b"\1", bytes(1000)):
        with pytest.raises(PayloadTooLongError):
            codec.decode(payload + more, spec, LIMIT)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("which", "name"), [(0, "a"), (1, "b"), (2, "c")])
def test_decode_names_the_tensor_that_is_not_finite(value, which, name):
    tensors = {
        "a": np.array([9, 0, 0], "f4"),
        "b": np.array([[0, 7], [0, 0]], "f4"),
        "c": np.array([0, 8, 0], "f4"),
    }
    payload = bytearray(TopK(density=0.3).encode(tensors))
    struct.pack_into("<f", payload, 4 * which, value)
    with pytest.raises(PayloadNotFiniteError, match=f'tensor "{name}"'):
        TopK(density=0.3).decode(payload, ParamSpec.of(tensors), LIMIT)


def test_what_decodes_has_no_more_than_k_values_or_is_refused():
    values = np.random.default_rng(2).standard_normal(50).astype(np.float32)
    codec, spec = TopK(density=0.1), ParamSpec.of({"a": values})
    payload = codec.encode({"a": values})
    refused = 0
    for bit in range(8 * len(payload)):
        flipped = bytearray(payload)
        flipped[bit // 8] ^= 1 << (bit % 8)
        try:
            decoded = codec.decode(flipped, spec, LIMIT)["a"]
        except CodecError:
            refused += 1
            continue
        assert np.count_nonzero(decoded) == 5
        assert np.isfinite(decoded).all()
    assert refused > 0
