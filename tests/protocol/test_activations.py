# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from protocol.activations import (
    FORMS,
    decode_mask,
    decode_states,
    encode_mask,
    encode_states,
    encoded_bytes,
)
from protocol.errors import MalformedError, NotFiniteError, TooLongError, TruncatedError
from protocol.tensors import TensorSpec

SPEC = TensorSpec((3, 4), "float32")
STATES = arrays(
    np.float32,
    st.integers(1, 4).map(lambda rows: (rows, 3, 4)),
    elements=st.floats(-6e4, 6e4, width=32),
)


@given(states=STATES)
def test_float32_comes_back_as_it_was(states: np.ndarray) -> None:
    raw = encode_states(states, "float32")
    assert np.array_equal(decode_states(raw, SPEC, len(states), "float32"), states)


@given(states=STATES)
def test_float16_is_the_nearest(states: np.ndarray) -> None:
    found = decode_states(encode_states(states, "float16"), SPEC, len(states), "float16")
    assert np.array_equal(found, states.astype(np.float16).astype(np.float32))


@given(states=STATES)
def test_int8_is_off_by_half_a_step_of_its_token_at_most(states: np.ndarray) -> None:
    found = decode_states(encode_states(states, "int8"), SPEC, len(states), "int8")
    for row in range(len(states)):
        for token in range(3):
            step = float(np.abs(states[row, token]).max()) / 127
            error = np.abs(found[row, token] - states[row, token]).max()
            assert error <= 0.5 * step * (1 + 1e-5) + 1.5e-36  # tiny scales are zero


@given(states=STATES, form=st.sampled_from(FORMS))
def test_length_is_known_beforehand(states: np.ndarray, form: str) -> None:
    raw = encode_states(states, form)
    rows = len(states)
    assert len(raw) == encoded_bytes(SPEC, rows, form)
    with pytest.raises(TruncatedError):
        decode_states(raw[:-1], SPEC, rows, form)
    with pytest.raises(TooLongError):
        decode_states(raw + b"\0", SPEC, rows, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_refused_on_both_sides(form: str, value: float) -> None:
    states = np.zeros((1, 3, 4), np.float32)
    raw = bytearray(encode_states(states, form))
    states[0, 1, 2] = value
    with pytest.raises(ValueError, match="expected finite values"):
        encode_states(states, form)
    kind = "<f2" if form == "float16" else "<f4"
    filled = np.full(3, value, kind).tobytes()
    raw[: len(filled)] = filled  # of int8 the scales, which come first
    if form == "int8":
        raw[12:] = b"\1" * 12
    with pytest.raises(NotFiniteError):
        decode_states(bytes(raw), SPEC, 1, form)


def test_what_float16_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="up to 65504 for float16, found 70000"):
        encode_states(np.full((1, 3, 4), 70_000, np.float32), "float16")


@given(kept=arrays(np.bool_, (2, 1, 1, 5)))
def test_masks_come_back(kept: np.ndarray) -> None:
    mask = np.where(kept, 0, -10_000).astype(np.float32)
    spec = TensorSpec((1, 1, 5), "float32")
    raw = encode_mask(mask)
    assert np.array_equal(decode_mask(raw, spec, 2, -10_000), mask)
    with pytest.raises(TruncatedError):
        decode_mask(raw[:-1], spec, 2, -10_000)
    with pytest.raises(MalformedError, match="expected 0 and 1, found 2"):
        decode_mask(b"\2" + raw[1:], spec, 2, -10_000)
