# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from aggregation import PayloadMalformedError
from aggregation.codecs.int4 import Int4
from protocol import ParamSpec

SPEC = ParamSpec.of({"a": np.zeros((1, 5), "f4")})


def scales(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


def test_whole_steps_are_written_two_a_byte_lower_half_first():
    values = np.array([[7, -7, 1, 0, -1]], "f4") / 4
    payload = Int4().encode({"a": values})
    assert payload == scales(0.25) + bytes([0x97, 0x01, 0x0F])
    np.testing.assert_array_equal(Int4().decode(payload, SPEC, 20)["a"], values)


def test_channels_of_odd_length_share_bytes():
    values = np.array([[7, 1, 2], [-3, -7, 4]], "f4") * np.array([[2], [8]], "f4")
    payload = Int4(per_channel=True).encode({"a": values})
    assert payload == scales(2, 8) + bytes([0x17, 0xD2, 0x49])
    decoded = Int4(per_channel=True).decode(payload, ParamSpec.of({"a": values}), 24)["a"]
    np.testing.assert_array_equal(decoded, values)


@pytest.mark.parametrize("integers", [b"\x08\0\0", b"\x80\0\0", b"\0\0\x08"])
def test_decode_refuses_when_an_integer_is_one_that_no_value_gives(integers):
    with pytest.raises(PayloadMalformedError, match=r'tensor "a": .* from -7 to 7, found -8'):
        Int4().decode(scales(1) + integers, SPEC, 20)


@pytest.mark.parametrize("half", range(1, 16))
def test_decode_refuses_when_the_unused_half_is_not_0(half):
    with pytest.raises(PayloadMalformedError, match=r'tensor "a": expected unused bits to be 0'):
        Int4().decode(scales(1) + bytes([0, 0, half << 4]), SPEC, 20)


@pytest.mark.parametrize("integer", [1, 15, 7])
def test_decode_refuses_when_a_channel_of_scale_0_is_not_zeros(integer):
    spec = ParamSpec.of({"a": np.zeros((2, 3), "f4")})
    channels = Int4(per_channel=True)
    channels.decode(scales(1, 0) + bytes([0, integer, 0]), spec, 24)
    with pytest.raises(PayloadMalformedError, match="zeros in a channel of scale 0"):
        channels.decode(scales(1, 0) + bytes([0, integer << 4, 0]), spec, 24)
    with pytest.raises(PayloadMalformedError, match="zeros in a channel of scale 0"):
        Int4().decode(scales(0) + bytes([0, integer, 0]), spec, 24)


def test_error_on_normal_values_is_a_sixth_of_a_squared_step():
    values = np.random.default_rng(0).standard_normal(100_000).astype("f4")
    decoded = Int4().decode(Int4().encode({"a": values}), ParamSpec.of({"a": values}), 400_000)["a"]
    # steps are 0.6 of a deviation: wide, and still about evenly filled
    step = np.abs(values).max() / 7
    assert np.square(decoded - values).mean() == pytest.approx(step**2 / 6, rel=0.05)
