# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation import CodecError
from aggregation.packing import pack, packed_bytes, unpack

BITS = st.integers(1, 32)


def slow_pack(values: list[int], bits: int) -> bytes:
    """All values as digits of one integer."""
    whole = sum(value << (place * bits) for place, value in enumerate(values))
    return whole.to_bytes((len(values) * bits + 7) // 8, "little")


@given(bits=BITS, data=st.data())
def test_packing_is_that_of_one_long_integer(bits: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=40))
    payload = pack(np.array(values, np.uint64), bits)
    assert payload == slow_pack(values, bits)
    assert len(payload) == packed_bytes(len(values), bits)
    assert unpack(payload, bits, len(values)).tolist() == values


@pytest.mark.parametrize("bits", [1, 7, 15, 32])
@pytest.mark.parametrize("count", [(1 << 15) - 1, 1 << 15, (1 << 15) + 9])
def test_blocks_join_without_gaps(bits: int, count: int) -> None:
    values = np.random.default_rng(0).integers(0, 1 << bits, count, dtype=np.uint64)
    payload = pack(values, bits)
    assert payload == slow_pack(values.tolist(), bits)
    np.testing.assert_array_equal(unpack(memoryview(payload), bits, count), values)


def test_what_no_packer_writes_is_refused() -> None:
    payload = pack(np.array([1, 2, 3], np.uint32), 3)
    for wrong in (payload[:-1], payload + b"\0", bytes([payload[0], payload[1] | 0x80])):
        with pytest.raises(CodecError):
            unpack(wrong, 3, 3)


def test_values_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="below 2\\^3, found 8"):
        pack(np.array([8], np.uint32), 3)
    with pytest.raises(ValueError, match="unsigned"):
        pack(np.array([1]), 3)
    for bits in (0, 33):
        with pytest.raises(ValueError, match="1 to 32"):
            pack(np.zeros(1, np.uint32), bits)
        with pytest.raises(ValueError, match="1 to 32"):
            unpack(b"", bits, 0)
