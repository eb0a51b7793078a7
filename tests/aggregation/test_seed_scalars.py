# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from aggregation import CodecError, PayloadNotFiniteError, Seeds
from aggregation.codecs import seed_scalars
from aggregation.codecs.seed_scalars import (
    MAX_COUNT,
    UNIT,
    SeedScalars,
    directions,
    expand,
    ones,
    project,
)
from aggregation.counter_rng import SEED_SCALARS, words
from protocol import ParamSpec

ELEMENTS = st.floats(-1e6, 1e6, width=32)
SEEDS = st.integers(0, 2**64 - 1)
SCALARS = npst.arrays(np.float32, st.integers(1, 9), elements=ELEMENTS | st.just(0.0))


def flat_spec(size: int) -> ParamSpec:
    return ParamSpec.of({"a": np.zeros(size, "f4")})


def slow_integers(seed: int, number: int, size: int) -> list[int]:
    """A direction in units of UNIT, value by value."""
    drawn = [int(words(seed, SEED_SCALARS, [number], i, 1)[0, 0]) for i in range(size)]
    return [bin(word).count("1") - 16 for word in drawn]


def slow_expand(scalars: list[float], seed: int, size: int) -> list[float]:
    """Value by value, directions in order, rounded once."""
    rows = [slow_integers(seed, number, size) for number in range(len(scalars))]
    values = []
    for i in range(size):
        total = 0.0
        for scalar, row in zip(scalars, rows, strict=True):
            total += scalar * row[i]
        values.append(float(np.float32(total * UNIT)))
    return values


@given(npst.arrays(np.uint32, st.integers(0, 20)))
def test_ones_counts_bits(values):
    assert ones(values).tolist() == [bin(value).count("1") for value in values.tolist()]


def test_the_unit_is_exact_with_every_integer_and_gives_variance_1():
    for integer in range(-16, 17):
        assert float(np.float32(integer * UNIT)) == integer * UNIT
        assert Fraction(integer * UNIT) == integer * Fraction(UNIT)
    chances = [math.comb(32, ones) / 2**32 for ones in range(33)]
    moments = [
        sum(p * ((ones - 16) * UNIT) ** power for ones, p in enumerate(chances))
        for power in (1, 2, 4)
    ]
    assert moments == pytest.approx([0, 1, 2.9375], abs=1e-5)
    assert moments[1] == pytest.approx(1 - 5e-7, abs=1e-7)


@given(scalars=SCALARS, seed=SEEDS, size=st.integers(1, 12))
def test_expand_is_the_slow_sum_bit_for_bit(scalars, seed, size):
    found = expand(scalars, flat_spec(size), seed=seed)["a"]
    assert found.tolist() == slow_expand(scalars.tolist(), seed, size)


@given(seed=SEEDS, first=st.integers(0, 2**32 - 3), size=st.integers(1, 12))
def test_directions_are_those_of_the_slow_oracle(seed, first, size):
    found = directions(flat_spec(size), seed=seed, first=first, count=2)
    assert found.dtype == np.float32
    assert found.tolist() == [
        [UNIT * n for n in slow_integers(seed, first + row, size)] for row in range(2)
    ]


@given(
    values=npst.arrays(np.float32, st.integers(1, 12), elements=ELEMENTS),
    seed=SEEDS,
    count=st.integers(1, 9),
)
def test_project_is_the_slow_inner_product(values, seed, count):
    found = project({"a": values}, count, seed=seed)
    scale = float(np.abs(values).max())
    for number, scalar in enumerate(found):
        exact = sum(
            (
                Fraction(n) * Fraction(v)
                for n, v in zip(
                    slow_integers(seed, number, values.size), values.tolist(), strict=True
                )
            ),
            Fraction(0),
        )
        expected = float(exact * Fraction(UNIT) / (count + values.size + Fraction(15, 16)))
        assert scalar == pytest.approx(expected, rel=1e-12, abs=1e-12 * scale)


@pytest.mark.parametrize(
    ("seed", "number", "integers"),
    [
        (0, 0, [1, 3, 1, 1, -1, -2, 4, 1, 1, -4, 0, 1]),
        (2**64 - 1, 4095, [-1, 2, 1, 1, 5, 3, -3, -1, -3, 3, 0, 3]),
    ],
)
def test_known_directions(seed, number, integers):
    found = directions(flat_spec(12), seed=seed, first=number)[0]
    assert (found / np.float32(UNIT)).tolist() == integers


@pytest.mark.parametrize(("values", "drawn"), [(4, 4), (8, 50), (64, 1)])
def test_blocks_do_not_show_in_the_bits(values, drawn, monkeypatch):
    rng = np.random.default_rng(0)
    spec = ParamSpec.of({"a": np.zeros((3, 7), "f4"), "b": np.zeros(50, "f4")})
    scalars = rng.standard_normal(13).astype("f4")
    expected = spec.flatten(expand(scalars, spec, seed=5))
    rows = directions(spec, seed=5, count=13)
    monkeypatch.setattr(seed_scalars, "_VALUES", values)
    monkeypatch.setattr(seed_scalars, "_WORDS", drawn)
    assert spec.flatten(expand(scalars, spec, seed=5)).tobytes() == expected.tobytes()
    assert directions(spec, seed=5, count=13).tobytes() == rows.tobytes()


def test_directions_have_independent_values_of_mean_0_and_variance_1():
    rows = directions(flat_spec(300), seed=11, count=400).astype(np.float64)
    assert abs(rows.mean()) < 5 / math.sqrt(rows.size)
    assert np.square(rows).mean() == pytest.approx(1, abs=5 * math.sqrt(2 / rows.size))
    for products in (rows @ rows.T / 300, rows.T @ rows / 400):
        others = products[~np.eye(len(products), dtype=bool)]
        width = 300 if len(products) == 400 else 400
        assert np.square(others).mean() == pytest.approx(1 / width, rel=0.05)
        assert np.abs(others).max() < 6 / math.sqrt(width)


def test_the_mean_of_scalars_is_the_mean_of_models():
    # FedKSeed: clients step along directions of a common pool; averaging their whole models is
    # the same as averaging what they stepped along each direction.
    rng = np.random.default_rng(1)
    pool, seed, learning_rate = 64, 123, 0.01
    spec = ParamSpec.of({"w": np.zeros((9, 5), "f4"), "bias": np.zeros(9, "f4")})
    start = rng.standard_normal(spec.size)
    rows = directions(spec, seed=seed, count=pool).astype(np.float64)
    weights = np.array([0.5, 0.2, 0.3])
    models, sums = [], np.zeros((3, pool))
    for client in range(3):
        model = start.copy()
        for _ in range(200):
            number = int(rng.integers(pool))
            slope = float(rng.normal())  # stands for (ℓ₊ - ℓ₋) / 2ε
            model -= learning_rate * slope * rows[number]
            sums[client, number] += slope
        models.append(model)
    mean_model = weights @ np.array(models)
    change = expand(-learning_rate * (weights @ sums), spec, seed=seed)
    np.testing.assert_allclose(start + spec.flatten(change), mean_model, rtol=0, atol=1e-6)


def test_sums_of_payloads_decode_to_sums_of_tensors():
    rng = np.random.default_rng(2)
    codec, seeds, spec = SeedScalars(count=50), Seeds(shared=3), flat_spec(200)
    payloads = [
        np.frombuffer(
            codec.encode({"a": rng.standard_normal(200).astype("f4")}, seeds=seeds), "<f4"
        )
        for _ in range(4)
    ]
    decoded = [codec.decode(p.tobytes(), spec, 800, seeds=seeds)["a"] for p in payloads]
    total = codec.decode(np.sum(payloads, axis=0).tobytes(), spec, 800, seeds=seeds)["a"]
    np.testing.assert_allclose(total, np.sum(decoded, axis=0), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("count", "size"), [(8, 60), (30, 60), (60, 60), (120, 60), (1, 1)])
def test_the_codec_shrinks_what_is_left_by_the_factor_that_was_derived(count, size):
    values = np.random.default_rng(3).standard_normal(size).astype("f4")
    codec, spec, norm = SeedScalars(count=count), flat_spec(size), np.square(values).sum()
    errors, lengths = [], []
    for shared in range(600):
        seeds = Seeds(shared=shared)
        decoded = codec.decode(codec.encode({"a": values}, seeds=seeds), spec, 1000, seeds=seeds)[
            "a"
        ]
        errors.append(np.square(values - decoded).sum() / norm)
        lengths.append(np.square(decoded).sum() / norm)
    total = count + size + 15 / 16
    spread = 5 * np.std(errors) / math.sqrt(len(errors))
    assert abs(np.mean(errors) - (1 - count / total)) < spread
    assert np.mean(errors) + spread < 1
    # E‖c Σ z<z, x>‖² = c² K (K + d + 15/16) ‖x‖²
    assert abs(np.mean(lengths) - count / total) < 5 * np.std(lengths) / math.sqrt(len(lengths))


def test_error_feedback_sends_everything_in_the_end():
    values = np.random.default_rng(4).standard_normal(60)
    codec, spec = SeedScalars(count=30), flat_spec(60)
    left = values.copy()
    for shared in range(120):
        payload = codec.encode({"a": left.astype("f4")}, seeds=Seeds(shared=shared))
        left -= codec.decode(payload, spec, 1000, seeds=Seeds(shared=shared))["a"]
    assert np.linalg.norm(left) < 1e-4 * np.linalg.norm(values)


def test_the_unbiased_multiple_has_the_value_as_its_expected_value():
    values = np.random.default_rng(5).standard_normal(30).astype("f4")
    spec, count, runs = flat_spec(30), 20, 1500
    factor = (count + 30 + 15 / 16) / count
    rows = np.array(
        [
            factor * expand(project({"a": values}, count, seed=seed), spec, seed=seed)["a"]
            for seed in range(runs)
        ]
    )
    assert (np.abs(rows.mean(axis=0) - values) < 5 * rows.std(axis=0) / math.sqrt(runs)).all()


def test_scalars_are_float32_of_project_and_the_client_s_own_seed_plays_no_part():
    tensors = {"b": np.ones((2, 3), "f4"), "a": np.arange(4, dtype="f4")}
    codec = SeedScalars(count=7)
    payload = codec.encode(tensors, seeds=Seeds(own=1, shared=2))
    assert payload == project(tensors, 7, seed=2).astype("<f4").tobytes()
    assert payload == codec.encode(tensors, seeds=Seeds(own=3, shared=2))
    assert payload != codec.encode(tensors, seeds=Seeds(own=1, shared=3))
    spec = ParamSpec.of(tensors)
    decoded = codec.decode(payload, spec, 100, seeds=Seeds(own=8, shared=2))
    expected = expand(np.frombuffer(payload, "<f4"), spec, seed=2)
    assert spec.flatten(decoded).tobytes() == spec.flatten(expected).tobytes()


def test_directions_of_scalar_0_are_never_drawn(monkeypatch):
    scalars = np.zeros(5000)
    scalars[[3, 4999]] = 0.5, -2
    expected = 0.5 * directions(flat_spec(10), seed=1, first=3)
    expected = (expected - 2 * directions(flat_spec(10), seed=1, first=4999))[0]
    drawn = []

    def counting(seed, purpose, streams, start, count):
        drawn.extend(streams)
        return words(seed, purpose, streams, start, count)

    monkeypatch.setattr(seed_scalars, "words", counting)
    found = expand(scalars, flat_spec(10), seed=1)["a"]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert drawn == [3, 4999]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_decode_refuses_when_a_scalar_is_not_finite(value):
    with pytest.raises(PayloadNotFiniteError, match=r"seed scalars: .* found 1 NaN"):
        SeedScalars(count=2).decode(np.array([0, value], "<f4").tobytes(), flat_spec(3), 12)


def test_decode_refuses_when_a_sum_is_beyond_float32():
    payload = np.full(4, 3e38, "<f4").tobytes()
    with pytest.raises(PayloadNotFiniteError, match='tensor "a"'):
        SeedScalars(count=4).decode(payload, flat_spec(9), 36)


def test_encode_refuses_when_tensors_could_decode_beyond_float32():
    with pytest.raises(PayloadNotFiniteError, match="decode within float32"):
        SeedScalars(count=64).encode({"a": np.full(9, 3e38, "f4")})


@pytest.mark.parametrize("shape", [(), (0,), (2, 2), (MAX_COUNT + 1,)])
def test_expand_refuses_when_scalars_are_no_vector_of_a_bounded_length(shape):
    with pytest.raises(CodecError, match="expected shape"):
        expand(np.zeros(shape, "f4"), flat_spec(3), seed=0)


@pytest.mark.parametrize("count", [0, -1, MAX_COUNT + 1, 1.0, True, "8", None])
def test_settings_are_refused_when_the_count_is_out_of_range(count):
    with pytest.raises(CodecError, match=f"count: expected 1 to {MAX_COUNT}"):
        SeedScalars(count=count)
    with pytest.raises(CodecError, match=f"count: expected 1 to {MAX_COUNT}"):
        project({"a": np.zeros(1, "f4")}, count, seed=0)


def test_the_name_holds_the_count():
    assert SeedScalars(count=4096).name == "seed-scalars:4096"
