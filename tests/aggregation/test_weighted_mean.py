# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from aggregation import MergeError, WeightedMean
from protocol import ParamSpec

ELEMENTS = st.floats(-1e6, 1e6, width=32)
UPDATES = st.lists(
    st.tuples(npst.arrays(np.float32, (2, 3), elements=ELEMENTS), st.integers(1, 10_000)),
    min_size=1,
    max_size=6,
)
SPEC = ParamSpec.of({"a": np.zeros((2, 3), "f4")})


def merged(updates) -> np.ndarray:
    merger = WeightedMean()
    state = merger.init(SPEC)
    for values, weight in updates:
        state = merger.add(state, {"a": values}, weight)
    return merger.finish(state).delta["a"]


def slow_mean(updates) -> list[Fraction]:
    """Exact, value by value."""
    total = sum(weight for _, weight in updates)
    return [
        sum((Fraction(float(v.flat[i])) * w for v, w in updates), Fraction(0)) / total
        for i in range(6)
    ]


@given(UPDATES)
def test_mean_is_that_of_exact_arithmetic(updates):
    found = merged(updates)
    assert found.dtype == np.float32
    scale = max(float(np.abs(values).max()) for values, _ in updates)
    for value, exact in zip(found.flat, slow_mean(updates), strict=True):
        error = abs(Fraction(float(value)) - exact)
        # of two roundings, relative or among the smallest float32, and of the sum in float64
        assert error <= abs(exact) / 2**23 + Fraction(scale) / 2**48 + Fraction(1, 2**149)


@given(UPDATES)
def test_the_same_order_gives_the_same_bits_and_another_the_same_mean(updates):
    assert merged(updates).tobytes() == merged(updates).tobytes()
    scale = max(float(np.abs(values).max()) for values, _ in updates)
    tolerance = 1e-9 * scale + 2.0**-149  # that between neighbours among the smallest float32
    np.testing.assert_allclose(merged(updates), merged(updates[::-1]), rtol=1e-6, atol=tolerance)


@given(UPDATES)
def test_states_and_updates_are_never_written_to(updates):
    merger = WeightedMean()
    states = [merger.init(SPEC)]
    images = []
    before = [values.tobytes() for values, _ in updates]
    for values, weight in updates:
        images.append(states[-1].settled().tobytes())
        states.append(merger.add(states[-1], {"a": values}, weight))
    merger.finish(states[-1]).delta["a"][...] = 0
    assert [state.settled().tobytes() for state in states[:-1]] == images
    assert [values.tobytes() for values, _ in updates] == before
    assert [state.count for state in states] == list(range(len(updates) + 1))


def test_equal_updates_are_their_own_mean_bit_for_bit():
    values = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    assert (
        merged([(values, weight) for weight in (1, 40, 7, 123_456)]).tobytes() == values.tobytes()
    )


def test_scalars_and_other_float_types_keep_shape_and_type():
    tensors = {"half": np.ones(2, "f2"), "scale": np.array(3, "f4"), "wide": np.ones(1)}
    merger = WeightedMean()
    spec = ParamSpec.of(tensors)
    result = merger.finish(merger.add(merger.init(spec), tensors, 2)).delta
    assert spec.mismatch(result) is None
    assert result["scale"] == 3


def test_finish_refuses_when_nothing_was_added():
    with pytest.raises(MergeError, match="nothing was added"):
        WeightedMean().finish(WeightedMean().init(SPEC))


@pytest.mark.parametrize("weight", [0, -1, np.nan, np.inf, 10**400, "1", None, True, 1 + 0j])
def test_add_refuses_when_the_weight_is_not_positive_and_finite(weight):
    merger = WeightedMean()
    with pytest.raises(MergeError, match="weight"):
        merger.add(merger.init(SPEC), {"a": np.zeros((2, 3), "f4")}, weight)


def test_add_refuses_when_the_sum_of_weights_overflows():
    merger = WeightedMean()
    zeros = {"a": np.zeros((2, 3), "f4")}
    state = merger.add(merger.init(SPEC), zeros, 1.7e308)
    with pytest.raises(MergeError, match="finite sum of weights"):
        merger.add(state, zeros, 1.7e308)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_add_refuses_when_a_value_is_not_finite_and_the_old_state_stands(value):
    merger = WeightedMean()
    good, bad = np.ones((2, 3), "f4"), np.ones((2, 3), "f4")
    bad[1, 1] = value
    state = merger.add(merger.init(SPEC), {"a": good}, 1)
    with pytest.raises(MergeError, match='tensor "a"'):
        merger.add(state, {"a": bad}, 1)
    np.testing.assert_array_equal(merger.finish(state).delta["a"], good)


@pytest.mark.parametrize(
    "tensors", [{}, {"b": np.zeros((2, 3), "f4")}, {"a": np.zeros((3, 2), "f4")}, {"a": 1.0}]
)
def test_add_refuses_when_tensors_do_not_fit(tensors):
    with pytest.raises(MergeError, match="cannot merge: tensor"):
        WeightedMean().add(WeightedMean().init(SPEC), tensors, 1)


def test_init_refuses_integers():
    with pytest.raises(MergeError, match='"step" is int64'):
        WeightedMean().init(ParamSpec.of({"step": np.zeros(1, "i8")}))


def test_attributes_say_what_the_coordinator_needs_to_know():
    merger = WeightedMean()
    assert (merger.sum_only, merger.exact, merger.order_independent) == (True, True, False)


@given(st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_summing_a_few_at_a_time_gives_the_bits_of_one_after_another(count, seed):
    rng = np.random.default_rng(seed)
    spec = ParamSpec.of({"a": np.zeros((3, 5), "f4"), "b": np.zeros(2, "f8")})
    merger = WeightedMean()
    state = merger.init(spec)
    sums, total = np.zeros(17), 0.0
    for _ in range(count):
        update = {"a": rng.standard_normal((3, 5), np.float32), "b": rng.standard_normal(2)}
        weight = float(rng.integers(1, 1000)) / 7
        state = merger.add(state, update, weight)
        sums = sums + weight * np.concatenate([update["a"].reshape(-1), update["b"]])
        total += weight
    assert state.settled().tobytes() == sums.tobytes()
    found = merger.finish(state).delta
    np.testing.assert_array_equal(found["b"], (sums / total)[15:])


def test_memory_does_not_grow_with_the_number_of_updates():
    spec = ParamSpec.of({"a": np.zeros(50_000, "f4")})
    merger = WeightedMean()
    peaks = []
    for count in (40, 400):
        tracemalloc.start()
        state = merger.init(spec)
        for number in range(count):
            update = {"a": np.full(50_000, number, np.float32)}
            state = merger.add(state, update, 1.0)
        merger.finish(state)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] <= 1.05 * peaks[0]
