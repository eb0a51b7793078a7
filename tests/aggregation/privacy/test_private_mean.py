# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from aggregation.errors import MergeError, PrivacyError
from aggregation.privacy import Noise, clip, in_steps, noised_mean
from aggregation.privacy.private_mean import PrivateMean
from protocol import ParamSpec

SEED = bytes(range(32))
SPEC = ParamSpec.of({"a": np.zeros(4, "f4"), "b": np.zeros((2, 3), "f4")})
SHARED = ParamSpec.of({"b": np.zeros((2, 3), "f4")})
NOISE = Noise(clip=0.5, multiplier=1.0)
ROWS = npst.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.just(6)),
    elements=st.floats(-100, 100, width=32),
)


def merger(**changes: object) -> PrivateMean:
    settings = {"noise": NOISE, "expected": 4.0, "shared": SHARED, "seed": SEED, **changes}
    return PrivateMean(**settings)  # type: ignore[arg-type]


def update(row: np.ndarray) -> dict[str, np.ndarray]:
    return {"a": np.zeros(4, "f4"), "b": row.reshape(2, 3)}


def merged(rows: np.ndarray, rule: PrivateMean | None = None) -> dict[str, np.ndarray]:
    rule = rule or merger()
    state = rule.init(SPEC)
    for row in rows:
        state = rule.add(state, update(row), 1.0)
    return dict(rule.finish(state).delta)


@given(ROWS)
def test_it_is_the_noised_sum_of_clipped_updates_in_steps(rows):
    sums = np.zeros(6, np.int64)
    for row in rows:
        sums += in_steps(SHARED, clip({"b": row.reshape(2, 3)}, 0.5).delta, NOISE.step)
    use = f"update/{hashlib.sha256(sums.astype('<i8').tobytes()).hexdigest()}"
    wanted = noised_mean(sums, NOISE, expected=4.0, seed=SEED, use=use).astype(np.float32)
    found = merged(rows)
    np.testing.assert_array_equal(found["b"].reshape(-1), wanted)
    assert not found["a"].any(), "tensors that nobody trained are told without noise: they are 0"


@given(ROWS, st.randoms(use_true_random=False))
def test_the_order_of_updates_does_not_matter_to_the_last_bit(rows, shuffler):
    order = list(range(len(rows)))
    shuffler.shuffle(order)
    assert merged(rows)["b"].tobytes() == merged(rows[order])["b"].tobytes()


def test_another_sum_has_noise_that_has_nothing_to_do_with_the_first():
    rows = np.random.default_rng(0).normal(0, 1e-6, (5, 6)).astype(np.float32)
    whole, less = merged(rows)["b"], merged(rows[:4])["b"]
    # With one noise they would differ by one update over four.
    assert np.abs(whole - less).max() > 1e-3
    assert merged(rows)["b"].tobytes() == whole.tobytes()


def test_without_updates_it_is_noise_alone():
    found = merged(np.zeros((0, 6), np.float32))["b"]
    assert found.any() and np.abs(found).max() < 10 * 0.5 / 4


def test_weights_do_not_count():
    rule = merger()
    row = np.full(6, 0.1, "f4")
    heavy = rule.finish(rule.add(rule.init(SPEC), update(row), 1e9)).delta["b"]
    assert heavy.tobytes() == merged(row[None])["b"].tobytes()


def test_updates_that_cannot_be_summed_are_refused_and_leave_the_state_alone():
    rule = merger()
    state = rule.add(rule.init(SPEC), update(np.ones(6, "f4")), 1.0)
    before = state.steps.copy()
    with pytest.raises(MergeError, match="cannot merge"):
        rule.add(state, {"a": np.zeros(4, "f4")}, 1.0)
    with pytest.raises(PrivacyError, match="finite"):
        rule.add(state, update(np.full(6, np.nan, "f4")), 1.0)
    with pytest.raises(MergeError, match="weight"):
        rule.add(state, update(np.ones(6, "f4")), 0.0)
    rule.add(state, update(np.ones(6, "f4")), 1.0)
    assert np.array_equal(state.steps, before) and state.count == 1


def test_a_sum_that_might_not_fit_takes_no_more():
    little = Noise(clip=1.0, multiplier=1e-4)
    rule = merger(noise=little)
    full = type(rule.init(SPEC))(spec=SPEC, steps=np.zeros(6, np.int64), count=little.most)
    with pytest.raises(MergeError, match="at most"):
        rule.add(full, update(np.ones(6, "f4")), 1.0)
