# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.errors import CodecError
from aggregation.packing import pack, packed_bytes, unpack, word_type


def literal(values: list[int], bits: int) -> bytes:
    """One long number, value i shifted by i·k bits."""
    number = sum(value << i * bits for i, value in enumerate(values))
    return number.to_bytes(packed_bytes(len(values), bits), "little")


@given(st.integers(1, 32), st.data())
def test_bytes_are_those_of_one_long_number(bits, data):
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=200))
    vector = np.array(values, word_type(bits))
    payload = pack(vector, bits)
    assert payload == literal(values, bits)
    found = unpack(payload, len(values), bits)
    assert found.dtype == vector.dtype and found.tolist() == values


@pytest.mark.parametrize("bits", range(1, 33))
def test_blocks_join_without_a_seam(bits):
    rng = np.random.default_rng(bits)
    for count in (65_535, 65_536, 131_075):
        values = rng.integers(0, 1 << bits, count, np.uint64).astype(word_type(bits))
        payload = pack(values, bits)
        assert len(payload) == packed_bytes(count, bits)
        np.testing.assert_array_equal(unpack(payload, count, bits), values)
    # across the seam, against the definition
    tail = values[65_528:65_544].tolist()
    assert payload[65_528 * bits // 8 : 65_544 * bits // 8] == literal(tail, bits)


@given(st.integers(1, 32), st.integers(0, 70), st.data())
def test_only_one_encoding_is_read(bits, count, data):
    payload = pack(np.zeros(count, word_type(bits)), bits)
    with pytest.raises(CodecError, match="bytes, found"):
        unpack(payload + b"\0", count, bits)
    if payload:
        with pytest.raises(CodecError, match="bytes, found"):
            unpack(payload[:-1], count, bits)
    unused = 8 * len(payload) - count * bits
    if unused:
        bit = data.draw(st.integers(8 - unused, 7))
        with pytest.raises(CodecError, match=f"last {unused} bits"):
            unpack(payload[:-1] + bytes([1 << bit]), count, bits)


def test_values_beyond_the_modulus_are_refused():
    with pytest.raises(CodecError, match=r"below 2\*\*7, found 128"):
        pack(np.array([1, 128], np.uint16), 7)
    with pytest.raises(CodecError, match="vector of uint16 for 7 bits, found uint32"):
        pack(np.array([1], np.uint32), 7)
