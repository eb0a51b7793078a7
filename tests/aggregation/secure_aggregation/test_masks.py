# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from aggregation.errors import CodecError, SecureSumError
from aggregation.packing import word_type
from aggregation.secure_aggregation.masks import add_mask, keystream, reduce, subtract_mask

KEYS = st.binary(min_size=32, max_size=32)
VECTORS = npst.arrays(st.sampled_from([np.uint16, np.uint32]), st.integers(0, 50))


def literal(key: bytes, count: int, width: int) -> list[int]:
    """The mask's words, one by one from the bytes of the stream."""
    stream = keystream(key).update(bytes(count * width))
    return [int.from_bytes(stream[i * width : (i + 1) * width], "little") for i in range(count)]


@given(VECTORS, KEYS)
def test_masks_are_the_words_of_the_stream(values, key):
    before = values.tolist()
    width = values.itemsize
    add_mask(values, key)
    mask = literal(key, values.size, width)
    assert values.tolist() == [(v + m) % 256**width for v, m in zip(before, mask, strict=True)]
    subtract_mask(values, key)
    assert values.tolist() == before


@pytest.mark.parametrize("kind", [np.uint16, np.uint32])
@pytest.mark.parametrize("count", [1 << 15, 1 << 16, (1 << 16) + 1, 200_003])
def test_blocks_go_on_where_the_last_one_ended(kind, count):
    values = np.zeros(count, kind)
    add_mask(values, bytes(range(32)))
    expected = keystream(bytes(range(32))).update(bytes(values.nbytes))
    assert values.astype(values.dtype.newbyteorder("<")).tobytes() == expected


@given(st.integers(1, 32), KEYS, st.data())
def test_low_bits_are_the_sum_modulo_two_to_the_k(bits, key, data):
    kind = word_type(bits)
    values = data.draw(npst.arrays(kind, 20, elements=st.integers(0, (1 << bits) - 1)))
    masked = values.copy()
    add_mask(masked, key)
    reduce(masked, bits)
    mask = literal(key, 20, kind.itemsize)
    assert masked.tolist() == [
        (v + m % 2**bits) % 2**bits for v, m in zip(values.tolist(), mask, strict=True)
    ]
    subtract_mask(masked, key)
    reduce(masked, bits)
    assert masked.tolist() == values.tolist()


def test_every_value_of_the_modulus_is_drawn():
    values = np.zeros(1 << 18, np.uint16)
    add_mask(values, bytes(32))
    assert np.bincount(values, minlength=1 << 16).max() < 30
    reduce(values, 3)
    counts = np.bincount(values, minlength=8)
    assert len(counts) == 8
    # chi-squared with 7 degrees: above 40 once in a million keys, and this key is fixed
    assert ((counts - 2**15) ** 2 / 2**15).sum() < 40


def test_memory_does_not_grow_with_the_vector():
    values = np.zeros(4_000_000, np.uint32)
    tracemalloc.start()
    add_mask(values, bytes(32))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 400_000


def test_words_are_as_wide_as_the_modulus_needs():
    assert [word_type(bits).name for bits in (1, 16, 17, 32)] == [
        "uint16", "uint16", "uint32", "uint32",
    ]  # fmt: skip
    for bits in (0, 33):
        with pytest.raises(CodecError, match="1 to 32"):
            word_type(bits)


@pytest.mark.parametrize(
    "values",
    [np.zeros(3, np.int32), np.zeros(3, np.uint64), np.zeros((2, 2), "u2"), np.zeros(8, "u2")[::2]],
    ids=["signed", "wide", "matrix", "strided"],
)
def test_other_values_are_refused(values):
    with pytest.raises(SecureSumError, match="values: expected"):
        add_mask(values, bytes(32))


def test_keys_of_another_length_are_refused():
    with pytest.raises(SecureSumError, match="32 bytes, found 16"):
        add_mask(np.zeros(3, np.uint16), bytes(16))
