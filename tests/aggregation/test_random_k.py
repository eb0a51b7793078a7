# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from aggregation import CodecError, PayloadNotFiniteError, Seeds
from aggregation.codecs import random_k
from aggregation.codecs.random_k import RandomK, smallest
from aggregation.counter_rng import RANDOM_K, double_words
from protocol import ParamSpec

ELEMENTS = st.floats(-1e6, 1e6, width=32)
VECTORS = npst.arrays(np.float32, st.integers(1, 60), elements=ELEMENTS)
DENSITIES = st.sampled_from([0.01, 0.05, 0.07, 0.1, 0.3, 0.5, 0.9, 0.999, 1.0])
SEEDS = st.integers(0, 2**64 - 1)


def slow_positions(seed: int, size: int, k: int) -> list[int]:
    """All keys, sorted."""
    keys = double_words(seed, RANDOM_K, 0, size).tolist()
    return sorted(sorted(range(size), key=lambda i: (keys[i], i))[:k])


def sent(size: int, density: float, shared: int) -> list[int]:
    """Positions by the codec: of ones, what is not decoded as 0."""
    codec, seeds = RandomK(density=density), Seeds(shared=shared)
    ones = {"a": np.ones(size, "f4")}
    decoded = codec.decode(
        codec.encode(ones, seeds=seeds), ParamSpec.of(ones), 1 << 30, seeds=seeds
    )
    return np.flatnonzero(decoded["a"]).tolist()


@given(values=VECTORS, density=DENSITIES, shared=SEEDS, unbiased=st.booleans())
def test_the_values_of_the_slow_oracle_s_positions_are_sent(values, density, shared, unbiased):
    codec, seeds = RandomK(density=density, unbiased=unbiased), Seeds(shared=shared)
    digits = round(1000 * density)
    k = -(-digits * values.size // 1000)
    positions = slow_positions(shared, values.size, k)
    scaled = values.astype(np.float64) * (values.size / k if unbiased else 1)
    payload = codec.encode({"a": values}, seeds=seeds)
    assert payload == scaled[positions].astype("<f4").tobytes()
    expected = np.zeros(values.size, "f4")
    expected[positions] = scaled[positions]
    spec = ParamSpec.of({"a": values})
    decoded = codec.decode(payload, spec, spec.nbytes, seeds=seeds)["a"]
    np.testing.assert_array_equal(decoded, expected)


@pytest.mark.parametrize(
    ("shared", "positions"),
    [
        (0, [30, 138, 497, 559, 574, 614, 666, 693, 698, 868]),
        (2**64 - 1, [211, 254, 278, 395, 600, 608, 670, 750, 815, 911]),
    ],
)
def test_known_positions(shared, positions):
    assert sent(1000, 0.01, shared) == positions


@pytest.mark.parametrize("size", [1 << 15, (1 << 15) + 1, 100_000])
@pytest.mark.parametrize("density", [0.00001, 0.05, 0.9])
def test_positions_are_the_smallest_keys_when_there_are_several_blocks(size, density):
    keys = double_words(7, RANDOM_K, 0, size)
    expected = np.argsort(keys, kind="stable")[: math.ceil(density * size)]
    assert sent(size, density, 7) == sorted(expected.tolist())


@given(
    st.lists(st.integers(0, 5) | st.sampled_from([2**63, 2**64 - 1]), min_size=1, max_size=40),
    st.data(),
)
def test_the_smallest_are_found_when_keys_tie_or_are_not_uniform(keys, data):
    k = data.draw(st.integers(1, len(keys)))
    array = np.array(keys, np.uint64)
    blocks = list(smallest(lambda start, count: array[start : start + count], len(keys), k))
    expected = sorted(range(len(keys)), key=lambda i: (keys[i], i))[:k]
    assert np.concatenate(blocks).tolist() == sorted(expected)


@pytest.mark.parametrize("k", [1, 4999, 5000, 5001, 10_000])
def test_the_smallest_are_found_when_none_is_where_uniform_keys_would_be(k):
    keys = np.repeat(np.array([5, 2**64 - 9], np.uint64), 5000)
    blocks = smallest(lambda start, count: keys[start : start + count], 10_000, k)
    assert np.concatenate(list(blocks)).tolist() == list(range(k))


@pytest.mark.parametrize("block", [1, 3, 64])
def test_blocks_do_not_show(block, monkeypatch):
    expected = sent(200, 0.3, 5)
    tied = np.arange(200, dtype=np.uint64) // 50
    monkeypatch.setattr(random_k, "_BLOCK", block)
    assert sent(200, 0.3, 5) == expected
    found = np.concatenate(
        list(smallest(lambda start, count: tied[start : start + count], 200, 70))
    )
    assert found.tolist() == list(range(70))


def test_every_subset_is_as_likely():
    runs = 2500
    counts = Counter(tuple(sent(5, 0.4, shared)) for shared in range(runs))
    assert set(counts) == set(combinations(range(5), 2))
    squares = sum((count - runs / 10) ** 2 / (runs / 10) for count in counts.values())
    assert squares < 27.9  # chi-squared, 9 degrees, 0.999


def test_positions_run_over_tensors_as_one_vector():
    rng = np.random.default_rng(0)
    tensors = {"b": rng.standard_normal((3, 5)), "a": rng.standard_normal(7), "c": np.ones(())}
    tensors = {name: array.astype("f4") for name, array in tensors.items()}
    spec = ParamSpec.of(tensors)
    seeds = Seeds(shared=9)
    whole = {"x": spec.flatten(tensors)}
    codec = RandomK(density=0.3)
    assert codec.encode(tensors, seeds=seeds) == codec.encode(whole, seeds=seeds)
    decoded = codec.decode(codec.encode(tensors, seeds=seeds), spec, 1000, seeds=seeds)
    flat = codec.decode(codec.encode(whole, seeds=seeds), ParamSpec.of(whole), 1000, seeds=seeds)
    np.testing.assert_array_equal(spec.flatten(decoded), flat["x"])


@pytest.mark.parametrize(
    ("density", "size", "k"),
    [(0.07, 100, 7), (0.1, 30, 3), (0.05, 1, 1), (1e-05, 10**5, 1), (1, 9, 9)],
)
def test_the_number_sent_is_that_of_the_decimal_digits(density, size, k):
    spec = ParamSpec.of({"a": np.zeros(size, "f4")})
    assert RandomK(density=density).payload_bytes(spec) == 4 * k


def test_clients_of_a_round_share_positions_and_payloads_can_be_summed():
    rng = np.random.default_rng(1)
    first, second = ({"a": rng.integers(-99, 99, 500).astype("f4")} for _ in range(2))
    codec, spec = RandomK(density=0.2), ParamSpec.of(first)
    total = sum(
        np.frombuffer(codec.encode(tensors, seeds=Seeds(own=own, shared=4)), "<f4")
        for own, tensors in enumerate((first, second))
    )
    decoded = codec.decode(total.tobytes(), spec, 2000, seeds=Seeds(own=5, shared=4))["a"]
    both = codec.encode({"a": first["a"] + second["a"]}, seeds=Seeds(own=6, shared=4))
    np.testing.assert_array_equal(
        decoded, codec.decode(both, spec, 2000, seeds=Seeds(shared=4))["a"]
    )
    assert codec.encode(first, seeds=Seeds(shared=5)) != codec.encode(first, seeds=Seeds(shared=4))


def decoded_of_many(codec: RandomK, values: np.ndarray, runs: int) -> np.ndarray:
    spec = ParamSpec.of({"a": values})
    rows = []
    for shared in range(runs):
        payload = codec.encode({"a": values}, seeds=Seeds(shared=shared))
        rows.append(codec.decode(payload, spec, spec.nbytes, seeds=Seeds(shared=shared))["a"])
    return np.array(rows, np.float64)


def test_unscaled_it_is_a_contraction_by_the_part_that_is_sent():
    values = np.random.default_rng(2).standard_normal(40).astype("f4")
    rows = decoded_of_many(RandomK(density=0.25), values, 1000)
    errors = np.square(rows - values).sum(axis=1) / np.square(values).sum()
    assert errors.max() < 1
    assert errors.mean() == pytest.approx(0.75, abs=0.015)


def test_scaled_the_expected_value_is_the_value():
    values = np.random.default_rng(3).standard_normal(40).astype("f4")
    codec = RandomK(density=0.25, unbiased=True)
    rows = decoded_of_many(codec, values, 1000)
    # a value is 4 x with probability 1/4: a deviation of √3 |x|
    assert (np.abs(rows.mean(axis=0) - values) < 5 * np.abs(values) * math.sqrt(3 / 1000)).all()
    errors = np.square(rows - values).sum(axis=1) / np.square(values).sum()
    assert errors.mean() == pytest.approx(3, rel=0.05)


def test_encode_refuses_when_the_scale_takes_a_value_beyond_float32():
    tensors = {"a": np.ones(9, "f4"), "big": np.array([1e38], "f4")}
    RandomK(density=0.1).encode(tensors)
    with pytest.raises(PayloadNotFiniteError, match='tensor "big"'):
        RandomK(density=0.1, unbiased=True).encode(tensors)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_decode_refuses_when_a_value_is_not_finite(value):
    (position,) = slow_positions(0, 6, 1)
    name = "a" if position < 3 else "b"
    spec = ParamSpec.of({"a": np.zeros(3, "f4"), "b": np.zeros(3, "f4")})
    with pytest.raises(PayloadNotFiniteError, match=f'tensor "{name}": .* found 1 NaN'):
        RandomK(density=0.1).decode(np.array([value], "<f4").tobytes(), spec, 24)


@pytest.mark.parametrize("density", [0, -0.1, 1.1, np.nan, np.inf, True, "0.1", None, 10**400])
def test_settings_are_refused_when_the_density_is_no_part(density):
    with pytest.raises(CodecError, match="density: expected a number above 0 up to 1"):
        RandomK(density=density)


@pytest.mark.parametrize("flag", [1, None, "yes"])
def test_settings_are_refused_when_unbiased_is_no_flag(flag):
    with pytest.raises(CodecError, match="unbiased: expected true or false"):
        RandomK(density=0.1, unbiased=flag)


def test_the_name_holds_the_settings():
    assert RandomK(density=0.05).name == "random-k:0.05"
    assert RandomK(density=1e-05, unbiased=True).name == "random-k:1e-05,unbiased"
    assert RandomK(density=1).name == RandomK(density=1.0).name == "random-k:1.0"
