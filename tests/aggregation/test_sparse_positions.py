# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from aggregation.codecs import sparse_positions
from aggregation.codecs.sparse_positions import (
    Golomb,
    decode_positions,
    encode_positions,
    most_bits,
    read_bits,
    stir,
    unstir,
)
from aggregation.errors import (
    PayloadMalformedError,
    PayloadTooLongError,
    PayloadTruncatedError,
)


@st.composite
def sets(draw: st.DrawFn, largest: int = 400) -> tuple[int, list[int]]:
    """A size and increasing positions below it, of any density."""
    size = draw(st.integers(1, largest))
    numbers = st.integers(0, size - 1)
    most = draw(st.sampled_from([1, 3, 20, size]))
    return size, sorted(draw(st.sets(numbers, min_size=1, max_size=min(most, size))))


def slow_parameter(size: int, count: int) -> int:
    """Gallager and van Voorhis, literally."""
    miss = Fraction(size - count, size)
    parameter = 1
    while miss**parameter * (1 + miss) > 1:
        parameter += 1
    return parameter


def slow_bits(size: int, positions: list[int], *, stirred: bool) -> list[int]:
    """The format, one code word after another."""
    parameter = slow_parameter(size, len(positions))
    width = int(math.log2(parameter))
    short = 2 ** (width + 1) - parameter
    planes: list[list[int]] = [[] for _ in range(width)]
    extras, unary = [], []
    before = -1
    for position in positions:
        quotient, remainder = divmod(position - before - 1, parameter)
        word = remainder
        if remainder >= short:
            word, extra = divmod(remainder + short, 2)
            extras.append(extra)
        for bit, plane in enumerate(planes):
            plane.append(word // 2**bit % 2)
        unary += [0] * quotient + [1]
        before = position
    flag = [int(stirred)] if parameter > 1 else []
    return flag + list(itertools.chain(*planes)) + extras + unary


def slow_stir(position: int, size: int) -> int:
    bits = (size - 1).bit_length()
    while True:
        for multiplier in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
            position = position * multiplier % 2**bits
            position ^= position >> ((bits + 1) // 2)
        if position < size:
            return position


def packed(bits: list[int] | np.ndarray, *, start: int = 0) -> np.ndarray:
    return np.packbits(np.array([1] * start + list(bits), np.uint8), bitorder="little")


def decoded(data: np.ndarray, size: int, count: int, *, start: int = 0) -> list[int]:
    found: list[int] = []
    for before, block in decode_positions(data, start, size, count):
        assert before == len(found)
        assert block.dtype == np.int64
        found += block.tolist()
    return found


@given(sets())
def test_bits_are_the_shorter_of_the_two_of_the_slow_oracle(drawn):
    size, positions = drawn
    bits, order = encode_positions(np.array(positions), size)
    plain = slow_bits(size, positions, stirred=False)
    elsewhere = sorted((slow_stir(position, size), position) for position in positions)
    stirred = slow_bits(size, [there for there, _ in elsewhere], stirred=True)
    if slow_parameter(size, len(positions)) > 1 and len(stirred) < len(plain):
        assert bits.tolist() == stirred
        assert order.tolist() == [here for _, here in elsewhere]
    else:
        assert bits.tolist() == plain
        assert order.tolist() == positions


@given(sets(), st.integers(0, 20), st.sampled_from([8, 13, 64, 1 << 16]))
def test_positions_come_back_in_the_order_that_was_told_whatever_the_blocks(drawn, start, block):
    size, positions = drawn
    bits, order = encode_positions(np.array(positions), size)
    data = packed(bits, start=start)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_positions, "_BLOCK", block)
        assert decoded(data, size, len(positions), start=start) == order.tolist()
    assert sorted(order.tolist()) == positions


@pytest.mark.parametrize("size", range(1, 11))
def test_every_small_set_comes_back_and_the_longest_has_most_bits(size):
    for count in range(1, size + 1):
        longest = 0
        for positions in itertools.combinations(range(size), count):
            bits, order = encode_positions(np.array(positions), size)
            assert decoded(packed(bits), size, count) == order.tolist()
            longest = max(longest, len(slow_bits(size, list(positions), stirred=False)))
        assert longest == most_bits(size, count)


@pytest.mark.parametrize(("size", "count"), [(1 << 20, 3), (300_000, 30_000), (200_000, 90_000)])
def test_sets_of_many_blocks_come_back(size, count):
    rng = np.random.default_rng(count)
    chosen = np.sort(rng.choice(size, count, replace=False))
    for positions in (chosen, np.arange(count) * (size // count), np.arange(size - count, size)):
        bits, order = encode_positions(positions, size)
        assert bits.size <= most_bits(size, count)
        assert decoded(packed(bits), size, count) == order.tolist()
        np.testing.assert_array_equal(np.sort(order), positions)


@given(st.integers(1, 500), st.data())
def test_the_parameter_is_the_optimum(size, data):
    count = data.draw(st.integers(1, size))
    assert Golomb.of(size, count).parameter == slow_parameter(size, count)


@pytest.mark.parametrize(
    ("size", "count", "parameter"),
    [
        (10**6, 50_000, 14),
        (10**6, 100_000, 7),
        (10**6, 200_000, 3),
        (10**6, 381_966, 2),  # above 1 - 1/φ, 0.3819660112..., it is 1
        (10**6, 381_967, 1),
        (10**6, 500_000, 1),
        (1 << 36, 1, 47_632_711_549),  # ⌈2³⁶ ln 2 - 0.85⌉
    ],
)
def test_known_parameters(size, count, parameter):
    assert Golomb.of(size, count).parameter == parameter


@given(sets(5000))
def test_stirring_is_that_of_the_slow_oracle_and_has_an_inverse(drawn):
    size, positions = drawn
    stirred = stir(np.array(positions), size)
    assert stirred.tolist() == [slow_stir(position, size) for position in positions]
    assert unstir(stirred, size).tolist() == positions


@pytest.mark.parametrize("size", [*range(1, 130), 1000, 1024, 1025, 65_537])
def test_stirring_is_a_bijection(size):
    everything = np.arange(size)
    assert np.array_equal(np.sort(stir(everything, size)), everything)


def test_stirring_reaches_the_largest_specs():
    size = (1 << 36) - 5
    positions = np.random.default_rng(0).integers(0, size, 1000)
    stirred = stir(positions, size)
    assert stirred.min() >= 0 and stirred.max() < size
    np.testing.assert_array_equal(unstir(stirred, size), positions)


@pytest.mark.parametrize(("size", "step"), [(20_000, 5), (20_000, 9), (20_000, 20), (100_000, 33)])
def test_regular_positions_cost_no_more_than_random_ones(size, step):
    positions = np.arange(step - 1, size, step)
    count = positions.size
    part = count / size
    entropy = -size * (part * math.log2(part) + (1 - part) * math.log2(1 - part))
    plain = slow_bits(size, positions.tolist(), stirred=False)
    bits, _ = encode_positions(positions, size)
    assert len(plain) > 1.04 * entropy, "the plain code would do: stirring is not tested here"
    assert len(bits) < 1.016 * entropy


def test_known_bits():
    # M = 4: b = 2, u = 4, no extra bits; gaps 3, 0, 6 are 0·4+3, 0·4+0, 1·4+2
    bits, order = encode_positions(np.array([3, 4, 11]), 18)
    assert Golomb.of(18, 3).parameter == 4
    assert order.tolist() == [3, 4, 11]
    assert bits.tolist() == [0, *(1, 0, 0), *(1, 0, 1), *(1, 1, 0, 1)]
    # M = 3: b = 1, u = 1; gaps 2, 1, 3 have the words 11, 10 and, behind a zero, 0
    bits, order = encode_positions(np.array([2, 4, 8]), 15)
    assert Golomb.of(15, 3).parameter == 3
    assert order.tolist() == [2, 4, 8]
    assert bits.tolist() == [0, *(1, 1, 0), *(1, 0), *(1, 1, 0, 1)]
    # M = 1: a mask
    bits, order = encode_positions(np.array([0, 2, 3, 6]), 9)
    assert bits.tolist() == [1, 0, 1, 1, 0, 0, 1]


def test_known_stirred_bits():
    bits, order = encode_positions(np.arange(4, 40, 5), 40)
    assert order.tolist() == [4, 39, 29, 14, 19, 24, 9, 34]
    assert packed(bits).tobytes().hex() == "c7cb881e"


@given(sets(100), st.data())
def test_decode_refuses_every_cut(drawn, data):
    size, positions = drawn
    payload = packed(encode_positions(np.array(positions), size)[0])
    end = data.draw(st.integers(0, payload.size - 1))
    with pytest.raises(PayloadTruncatedError):
        decoded(payload[:end], size, len(positions))


@given(sets(100), st.binary(min_size=1, max_size=30))
def test_decode_refuses_bytes_behind_the_end(drawn, more):
    size, positions = drawn
    payload = packed(encode_positions(np.array(positions), size)[0])
    longer = np.concatenate([payload, np.frombuffer(more, np.uint8)])
    with pytest.raises(PayloadTooLongError):
        decoded(longer, size, len(positions))


@given(sets(100))
def test_decode_refuses_what_is_longer_than_any_set_before_reading_it(drawn):
    size, positions = drawn
    most = (most_bits(size, len(positions)) + 7) // 8
    with pytest.raises(PayloadTooLongError, match=f"at most {most} bytes, found {most + 1}"):
        decoded(np.zeros(most + 1, np.uint8), size, len(positions))


@given(sets(100), st.data())
def test_decode_refuses_set_padding(drawn, data):
    size, positions = drawn
    bits, _ = encode_positions(np.array(positions), size)
    payload = packed(bits)
    assume(bits.size % 8)
    payload[-1] |= 1 << data.draw(st.integers(bits.size % 8, 7))
    with pytest.raises(PayloadMalformedError, match="unused bits"):
        decoded(payload, size, len(positions))


@given(sets(100), st.integers(0, 5), st.booleans())
def test_decode_refuses_positions_beyond_the_size(drawn, beyond, stirred):
    size, positions = drawn
    far = [*positions[:-1], size + beyond]
    # the oracle's parameter is that of the size, so that only the last position is wrong
    data = packed(slow_bits(size, far, stirred=stirred))
    with pytest.raises((PayloadMalformedError, PayloadTooLongError)) as raised:
        decoded(data, size, len(positions))
    if 8 * data.size <= most_bits(size, len(positions)):
        assert f"below {size}, found {size + beyond}" in str(raised.value)


@given(sets(60), st.binary(max_size=40))
def test_any_bytes_give_different_positions_below_the_size_or_raise(drawn, payload):
    size, positions = drawn
    try:
        found = decoded(np.frombuffer(payload, np.uint8), size, len(positions))
    except (PayloadMalformedError, PayloadTooLongError, PayloadTruncatedError):
        return
    assert len(set(found)) == len(found) == len(positions)
    assert min(found) >= 0 and max(found) < size


@given(st.binary(min_size=1, max_size=40), st.data())
def test_bits_are_read_from_anywhere(payload, data):
    bits = [payload[i // 8] >> (i % 8) & 1 for i in range(8 * len(payload))]
    start = data.draw(st.integers(0, len(bits)))
    count = data.draw(st.integers(0, len(bits) - start))
    read = read_bits(np.frombuffer(payload, np.uint8), start, count)
    assert read.tolist() == bits[start : start + count]
