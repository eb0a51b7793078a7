# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from aggregation.codecs.codec import Seeds
from aggregation.codecs.error_feedback import encode_with_feedback
from aggregation.codecs.float16 import Float16
from aggregation.codecs.float32 import Float32
from aggregation.codecs.one_bit import OneBit
from aggregation.codecs.ternary import Ternary
from aggregation.codecs.top_k import TopK
from aggregation.errors import CodecError, PayloadNotFiniteError, SpecMismatchError
from protocol.tensors import ParamSpec

CODECS = [
    Float32(),
    Float16(),
    OneBit(),
    Ternary(density=0.1),
    Ternary(density=0.3, scale="mean"),
    TopK(density=0.1),
]
ANY_CODEC = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
SPEC = ParamSpec.of({"a": np.zeros((5, 8), "f4"), "b": np.zeros((), "f4")})
ROUNDS = st.lists(
    npst.arrays(np.float32, SPEC.size, elements=st.floats(-1000, 1000, width=32)),
    min_size=1,
    max_size=5,
)
SEEDS = Seeds(own=1, shared=2)


def decoded(codec, payload: bytes) -> np.ndarray:
    return SPEC.flatten(codec.decode(payload, SPEC, SPEC.nbytes, seeds=SEEDS))


@ANY_CODEC
@given(ROUNDS)
def test_what_was_decoded_and_the_last_residual_add_up_to_the_deltas(codec, deltas):
    carried, sent, residual = np.zeros(SPEC.size), np.zeros(SPEC.size), None
    largest = 0.0
    for delta in deltas:
        payload, residual = encode_with_feedback(
            codec, SPEC.unflatten(delta), residual, seeds=SEEDS
        )
        assert SPEC.mismatch(residual) is None
        values = decoded(codec, payload)
        carried += values
        sent += delta
        largest = max(largest, np.abs(values).max(), np.abs(SPEC.flatten(residual)).max(), 1e-30)
    difference = carried + SPEC.flatten(residual) - sent
    assert np.abs(difference).max() <= 4 * len(deltas) * largest * 2**-24


@ANY_CODEC
@given(ROUNDS, st.sampled_from([0.0, 0.5, 1.0]))
def test_a_round_is_that_of_the_slow_oracle(codec, deltas, decay):
    residual = None
    old: list[float] = []
    for delta in deltas:
        payload, residual = encode_with_feedback(
            codec, SPEC.unflatten(delta), residual, seeds=SEEDS, decay=decay
        )
        wanted = delta.tolist()
        if old:
            sums = [d + decay * e for d, e in zip(wanted, old, strict=True)]
            wanted = np.array(sums, np.float32).tolist()
        assert payload == codec.encode(SPEC.unflatten(np.array(wanted, "f4")), seeds=SEEDS)
        sent = decoded(codec, payload).tolist()
        old = [float(np.float32(w - s)) for w, s in zip(wanted, sent, strict=True)]
        assert SPEC.flatten(residual).tolist() == old


@ANY_CODEC
def test_arguments_are_never_written_to_nor_shared(codec):
    rng = np.random.default_rng(0)
    delta = SPEC.unflatten(rng.standard_normal(SPEC.size).astype("f4"))
    residual = SPEC.unflatten(rng.standard_normal(SPEC.size).astype("f4"))
    before = [array.tobytes() for tensors in (delta, residual) for array in tensors.values()]
    _, left = encode_with_feedback(codec, delta, residual, seeds=SEEDS)
    for array in left.values():
        array[...] = 7
    assert before == [array.tobytes() for part in (delta, residual) for array in part.values()]


def test_a_codec_without_loss_leaves_nothing():
    delta = SPEC.unflatten(np.random.default_rng(1).standard_normal(SPEC.size).astype("f4"))
    for residual in (None, {}):
        payload, left = encode_with_feedback(Float32(), delta, residual, seeds=SEEDS)
        assert payload == Float32().encode(delta)
        assert not SPEC.flatten(left).any()


@pytest.mark.parametrize("codec", [TopK(density=0.1), Ternary(density=0.1, scale="mean")])
def test_small_values_arrive_in_time_with_feedback_and_never_without(codec):
    delta = np.full(SPEC.size, 0.1, np.float32)
    delta[:5] = 1.0  # these alone survive a single round
    rounds = 400
    with_feedback, without, residual = np.zeros(SPEC.size), np.zeros(SPEC.size), None
    for _ in range(rounds):
        payload, residual = encode_with_feedback(
            codec, SPEC.unflatten(delta), residual, seeds=SEEDS
        )
        with_feedback += decoded(codec, payload) / rounds
        without += decoded(codec, codec.encode(SPEC.unflatten(delta))) / rounds
    np.testing.assert_allclose(with_feedback, delta, atol=0.03)
    assert not without[5:].any()


def test_the_seeds_reach_the_codec_both_ways():
    seen = []

    class Spy:
        def encode(self, tensors, *, seeds):
            seen.append(seeds)
            return Float32().encode(tensors, seeds=seeds)

        def decode(self, payload, spec, limit, *, seeds):
            seen.append(seeds)
            return Float32().decode(payload, spec, limit, seeds=seeds)

    encode_with_feedback(Spy(), SPEC.unflatten(np.ones(SPEC.size, "f4")), None, seeds=SEEDS)
    assert seen == [SEEDS, SEEDS]


@pytest.mark.parametrize(
    "residual",
    [
        {"a": np.zeros((5, 8), "f4")},
        {"a": np.zeros((8, 5), "f4"), "b": np.zeros((), "f4")},
        {"a": np.zeros((5, 8), "f8"), "b": np.zeros((), "f4")},
        {"a": np.zeros((5, 8), "f4"), "b": np.zeros((), "f4"), "c": np.zeros(1, "f4")},
        {"a": np.zeros((5, 8), "f4"), "b": 0.0},
    ],
)
def test_a_residual_of_another_spec_is_refused(residual):
    delta = SPEC.unflatten(np.ones(SPEC.size, "f4"))
    with pytest.raises(SpecMismatchError, match="residual: tensor"):
        encode_with_feedback(Float32(), delta, residual, seeds=SEEDS)


def test_a_delta_that_is_not_float32_is_refused():
    with pytest.raises(SpecMismatchError, match='"a" is float64'):
        encode_with_feedback(Float32(), {"a": np.zeros(2)}, None, seeds=SEEDS)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_is_refused(value, side):
    both = [SPEC.unflatten(np.ones(SPEC.size, "f4")) for _ in range(2)]
    both[side]["b"][...] = value
    with pytest.raises(PayloadNotFiniteError, match='tensor "b"'):
        encode_with_feedback(Float32(), *both, seeds=SEEDS)


def test_sums_and_residuals_beyond_float32_are_refused():
    large = {"a": np.array([3e38, -3e38], "f4")}
    with pytest.raises(PayloadNotFiniteError, match='tensor "a"'):
        encode_with_feedback(Float32(), large, large, seeds=SEEDS)
    # below the mean, like no other, and decoded above 0: what is left is 5e38
    outlier = {"a": np.full(100, 2.7e38, np.float32)}
    outlier["a"][7] = -2.7e38
    with pytest.raises(PayloadNotFiniteError, match='tensor "a"'):
        encode_with_feedback(OneBit(), outlier, None, seeds=SEEDS)


@pytest.mark.parametrize("decay", [-0.1, 1.1, math.nan, math.inf, True, "1", None])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(CodecError, match="decay: expected a number from 0 to 1"):
        encode_with_feedback(Float32(), {"a": np.zeros(2, "f4")}, None, seeds=SEEDS, decay=decay)
