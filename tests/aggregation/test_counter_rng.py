# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.counter_rng import RANDOM_K, SEED_SCALARS, double_words, philox4x32, words

# of Random123's kat_vectors, philox4x32 10: counter, key, answer
KNOWN = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]
SEEDS = st.integers(0, 2**64 - 1)


def numbers(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def slow_philox(counter: list[int], key: list[int]) -> list[int]:
    """One counter, in whole numbers."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        high_0, low_0 = divmod(a * 0xD2511F53, 2**32)
        high_1, low_1 = divmod(c * 0xCD9E8D57, 2**32)
        a, b, c, d = high_1 ^ b ^ k0, low_1, high_0 ^ d ^ k1, low_0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [a, b, c, d]


def slow_words(seed: int, purpose: int, stream: int, start: int, count: int) -> list[int]:
    """The stream, word by word."""
    found = []
    for word in range(start, start + count):
        index, place = divmod(word, 4)
        counter = [index % 2**32, index // 2**32, stream, purpose]
        found.append(slow_philox(counter, [seed % 2**32, seed // 2**32])[place])
    return found


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_answers_are_those_of_random123(counter, key, answer):
    arrays = tuple(np.array([word], np.uint64) for word in numbers(counter))
    found = philox4x32(arrays, tuple(numbers(key)))
    assert [int(part[0]) for part in found] == numbers(answer)
    assert slow_philox(numbers(counter), numbers(key)) == numbers(answer)


def test_counters_are_not_written_to():
    arrays = tuple(np.full(3, place, np.uint64) for place in range(4))
    philox4x32(arrays, (1, 2))
    assert [array.tolist() for array in arrays] == [[place] * 3 for place in range(4)]


@given(
    seed=SEEDS,
    purpose=st.sampled_from([RANDOM_K, SEED_SCALARS]),
    streams=st.lists(st.integers(0, 2**32 - 1), max_size=4),
    start=st.integers(0, 2**37) | st.integers(2**34 - 9, 2**34 + 1),
    count=st.integers(0, 11),
)
def test_words_are_those_of_the_slow_oracle(seed, purpose, streams, start, count):
    found = words(seed, purpose, streams, start, count)
    assert found.dtype == np.uint32 and found.shape == (len(streams), count)
    assert found.tolist() == [slow_words(seed, purpose, s, start, count) for s in streams]


@given(SEEDS, st.integers(0, 2**36), st.integers(0, 9))
def test_double_words_are_pairs_of_words_low_first(seed, start, count):
    found = double_words(seed, RANDOM_K, start, count)
    single = slow_words(seed, RANDOM_K, 0, 2 * start, 2 * count)
    assert found.dtype == np.uint64
    assert found.tolist() == [single[2 * i] + (single[2 * i + 1] << 32) for i in range(count)]


def test_every_part_of_the_address_gives_other_words():
    addresses = [
        (seed, purpose, stream, start)
        for seed in (0, 1, 2**32, 2**63)
        for purpose in (RANDOM_K, SEED_SCALARS)
        for stream in (0, 1, 2**31)
        for start in (0, 4, 2**34)
    ]
    drawn = {words(a, b, [c], d, 4).tobytes() for a, b, c, d in addresses}
    assert len(drawn) == len(addresses)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_words_refuse_when_the_seed_has_no_64_bits(seed):
    with pytest.raises(ValueError, match=r"seed: expected 0 to below 2\*\*64"):
        words(seed, RANDOM_K, [0], 0, 4)


@pytest.mark.parametrize("stream", [-1, 2**32])
def test_words_refuse_when_a_stream_has_no_32_bits(stream):
    with pytest.raises(ValueError, match=r"streams: expected 0 to below 2\*\*32"):
        words(0, RANDOM_K, [3, stream], 0, 4)
