# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from aggregation import Float16, PayloadNotFiniteError
from protocol import ParamSpec

IN_RANGE = st.floats(-65_504, 65_504, width=32)


@given(npst.arrays(np.float32, st.integers(1, 40), elements=IN_RANGE))
def test_values_are_rounded_as_ieee_halves(values):
    payload = Float16().encode({"a": values})
    assert payload == struct.pack(f"<{values.size}e", *values.tolist())
    decoded = Float16().decode(payload, ParamSpec.of({"a": values}), 1000)["a"]
    bound = np.maximum(np.abs(values.astype(np.float64)) * 2.0**-11, 2.0**-25)
    assert (np.abs(decoded.astype(np.float64) - values) <= bound).all()


def test_encode_refuses_when_a_value_would_round_to_infinity():
    largest = np.nextafter(np.float32(65_520), np.float32(0))
    spec = ParamSpec.of({"a": np.zeros(1, "f4")})
    payload = Float16().encode({"a": np.array([largest])})
    assert Float16().decode(payload, spec, 4)["a"] == 65_504
    for value in (65_520, -65_520, 1e38):
        tensors = {"a": np.zeros(1, "f4"), "big": np.array([0, value], "f4")}
        with pytest.raises(PayloadNotFiniteError, match=r'tensor "big": .* up to 65504'):
            Float16().encode(tensors)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_decode_refuses_when_a_value_is_not_finite(value):
    spec = ParamSpec.of({"a": np.ones(1, "f4")})
    with pytest.raises(PayloadNotFiniteError, match='tensor "a"'):
        Float16().decode(np.array([value], "<f2").tobytes(), spec, 4)
