# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from aggregation import PayloadMalformedError
from aggregation.codecs.int8 import Int8
from protocol import ParamSpec

SPEC = ParamSpec.of({"a": np.zeros((2, 3), "f4")})


def scales(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


def test_whole_steps_are_written_as_they_are():
    values = np.array([[127, -127, 1], [0, -1, 50]], "f4") / 4
    assert Int8().encode({"a": values}) == scales(0.25) + bytes([127, 129, 1, 0, 255, 50])
    rows = Int8(per_channel=True).encode({"a": values * np.array([[1], [127 / 50]], "f4")})
    assert rows[:9] == scales(0.25, 0.25) + bytes([127])
    assert rows[-1] == 127


def test_decode_takes_scales_then_integers():
    decoded = Int8(per_channel=True).decode(
        scales(0.5, 0) + bytes([129, 2, 255, 0, 0, 0]), SPEC, 24
    )
    np.testing.assert_array_equal(decoded["a"], [[-63.5, 1, -0.5], [0, 0, 0]])


def test_decode_refuses_when_an_integer_is_one_that_no_value_gives():
    with pytest.raises(PayloadMalformedError, match=r'tensor "a": .* from -127 to 127, found -128'):
        Int8().decode(scales(1) + bytes([0, 0, 0, 0, 128, 0]), SPEC, 24)


@pytest.mark.parametrize("integer", [1, 255, 127])
def test_decode_refuses_when_a_channel_of_scale_0_is_not_zeros(integer):
    channels = Int8(per_channel=True)
    channels.decode(scales(1, 0) + bytes([integer, 0, 0, 0, 0, 0]), SPEC, 24)
    with pytest.raises(PayloadMalformedError, match="zeros in a channel of scale 0"):
        channels.decode(scales(1, 0) + bytes([0, 0, 0, 0, integer, 0]), SPEC, 24)
    with pytest.raises(PayloadMalformedError, match="zeros in a channel of scale 0"):
        Int8().decode(scales(0) + bytes([0, 0, 0, 0, integer, 0]), SPEC, 24)


def test_error_on_normal_values_is_a_small_part_of_them():
    # Rounding at random: E f(1-f) = 1/6 of a squared step, a step being max / 127.
    values = np.random.default_rng(0).standard_normal(100_000).astype("f4")
    decoded = Int8().decode(Int8().encode({"a": values}), ParamSpec.of({"a": values}), 400_000)["a"]
    step = np.abs(values).max() / 127
    assert np.square(decoded - values).mean() == pytest.approx(step**2 / 6, rel=0.02)
