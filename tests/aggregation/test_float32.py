# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from aggregation import Float32, PayloadNotFiniteError
from protocol import ParamSpec

FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)


@given(npst.arrays(np.float32, st.integers(1, 40), elements=FINITE))
def test_round_trip_is_bit_exact_and_little_endian(values):
    tensors = {"a": values}
    payload = Float32().encode(tensors)
    assert payload == struct.pack(f"<{values.size}f", *values.tolist())
    assert Float32().decode(payload, ParamSpec.of(tensors), 1000)["a"].tobytes() == values.tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_decode_refuses_and_names_the_tensor_when_a_value_is_not_finite(value):
    spec = ParamSpec.of({"a": np.zeros(2, "f4"), "b": np.zeros(2, "f4")})
    payload = np.array([0, 0, 0, value], "<f4").tobytes()
    with pytest.raises(PayloadNotFiniteError, match=r'tensor "b": .* found 1 NaN'):
        Float32().decode(payload, spec, 1000)
