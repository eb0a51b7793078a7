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

from aggregation import PayloadNotFiniteError
from aggregation.codecs.bfloat16 import BFloat16
from protocol import ParamSpec

LARGEST = float.fromhex("0x1.fep127")  # bfloat16's
FIRST_TOO_LARGE = float.fromhex("0x1.ffp127")
IN_RANGE = st.floats(-LARGEST, LARGEST, width=32)


def slow_round(value: float) -> int:
    """The nearer of the two neighbours of 16 bits; the even one of two that are as near."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    near, far = bits >> 16, (bits >> 16) + 1
    if math.isinf(as_float(far)):
        return near  # the test keeps to what lies below half-way
    gaps = [abs(Fraction(as_float(half)) - Fraction(value)) for half in (near, far)]
    if gaps[0] == gaps[1]:
        return near if near % 2 == 0 else far
    return near if gaps[0] < gaps[1] else far


def as_float(half: int) -> float:
    return struct.unpack("<f", struct.pack("<I", half << 16))[0]


@given(npst.arrays(np.float32, st.integers(1, 40), elements=IN_RANGE))
def test_values_are_rounded_as_those_of_the_slow_oracle(values):
    payload = BFloat16().encode({"a": values})
    halves = [slow_round(float(value)) for value in values]
    assert payload == struct.pack(f"<{values.size}H", *halves)
    decoded = BFloat16().decode(payload, ParamSpec.of({"a": values}), 1000)["a"]
    assert decoded.tobytes() == np.array([as_float(half) for half in halves], "f4").tobytes()
    bound = np.maximum(np.abs(values.astype(np.float64)) * 2.0**-8, 2.0**-134)
    assert (np.abs(decoded.astype(np.float64) - values) <= bound).all()


@pytest.mark.parametrize(
    ("value", "rounded"),
    [
        ("0x1.01p0", "0x1.00p0"),  # half-way, the lower is even
        ("0x1.03p0", "0x1.04p0"),  # half-way, the upper is even
        ("0x1.010002p0", "0x1.02p0"),
        ("-0x1.01p0", "-0x1.00p0"),
        ("-0x1.03p0", "-0x1.04p0"),
        ("0x1.ffp0", "0x1p1"),
        ("0x1p-149", "0x0p0"),
        ("-0x0p0", "-0x0p0"),
    ],
)
def test_known_answers(value, rounded):
    values = np.array([float.fromhex(value)], "f4")
    decoded = BFloat16().decode(BFloat16().encode({"a": values}), ParamSpec.of({"a": values}), 4)
    assert float(decoded["a"][0]).hex() == float.fromhex(rounded).hex()


@given(st.integers(0, 0xFFFF))
def test_what_has_16_bits_already_stays_what_it_is(half):
    value = as_float(half)
    if math.isfinite(value):
        assert BFloat16().encode({"a": np.array([value], "f4")}) == struct.pack("<H", half)


def test_encode_refuses_when_a_value_would_round_to_infinity():
    below = np.nextafter(np.float32(FIRST_TOO_LARGE), np.float32(0))
    spec = ParamSpec.of({"a": np.zeros(1, "f4")})
    assert BFloat16().decode(BFloat16().encode({"a": np.array([-below])}), spec, 4)["a"] == -LARGEST
    for value in (FIRST_TOO_LARGE, -FIRST_TOO_LARGE, np.finfo("f4").max, np.finfo("f4").min):
        tensors = {"a": np.array([below]), "big": np.array([0, value], "f4")}
        with pytest.raises(PayloadNotFiniteError, match=r'tensor "big": .* up to 3.3895e38'):
            BFloat16().encode(tensors)


@pytest.mark.parametrize("half", [0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF])
def test_decode_refuses_when_a_value_is_not_finite(half):
    spec = ParamSpec.of({"a": np.ones(2, "f4"), "b": np.ones(1, "f4")})
    with pytest.raises(PayloadNotFiniteError, match='tensor "b"'):
        BFloat16().decode(struct.pack("<3H", 0, 0, half), spec, 100)
