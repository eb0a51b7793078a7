# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregation.errors import MergeError
from aggregation.mergers.flora import FLoRA
from protocol import ParamSpec
from protocol.factors import FactorPair

SCALE = 2.0
MERGER = FLoRA(pairs=(FactorPair(down="a", up="b", scale=SCALE),))


def tensors(rng, d, k, r) -> dict[str, np.ndarray]:
    return {
        "a": rng.standard_normal((r, k)).astype("f4"),
        "b": rng.standard_normal((d, r)).astype("f4"),
    }


def merged(current, updates):
    state = MERGER.init(ParamSpec.of(current), current=current)
    for update, weight in updates:
        state = MERGER.add(state, update, weight)
    return MERGER.finish(state)


def slow_product(current, updates) -> list[list[float]]:
    """s·Σ p_i B_i A_i, value by value."""
    (d, _), (_, k) = current["b"].shape, current["a"].shape
    total = sum(weight for _, weight in updates)
    product = [[0.0] * k for _ in range(d)]
    for update, weight in updates:
        for i in range(d):
            for j in range(k):
                for m in range(update["a"].shape[0]):
                    b = float(current["b"][i, m]) + float(update["b"][i, m])
                    a = float(current["a"][m, j]) + float(update["a"][m, j])
                    product[i][j] += SCALE * weight / total * b * a
    return product


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1),
    ranks=st.lists(st.integers(1, 3), min_size=1, max_size=6),
    d=st.integers(1, 6),
    k=st.integers(1, 6),
)
def test_base_change_is_that_of_the_slow_oracle_and_b_starts_anew(seed, ranks, d, k):
    rng = np.random.default_rng(seed)
    current = tensors(rng, d, k, 3)
    updates = [(tensors(rng, d, k, rank), int(rng.integers(1, 50))) for rank in ranks]
    result = merged(current, updates)
    np.testing.assert_allclose(
        result.base["a"].product(), slow_product(current, updates), rtol=1e-5, atol=1e-5
    )
    assert not (current["b"] + result.delta["b"]).any()
    assert not result.delta["a"].any()


def test_ranks_4_8_and_16_stack_with_the_weights_on_a_alone():
    rng = np.random.default_rng(0)
    current = tensors(rng, 80, 60, 16)
    updates = [(tensors(rng, 80, 60, rank), w) for rank, w in ((4, 1), (8, 2), (16, 5))]
    change = merged(current, updates).base["a"]
    assert change.left.shape == (80, 28)
    assert change.right is not None
    assert change.right.shape == (28, 60)
    np.testing.assert_array_equal(change.left[:, 4:12], current["b"][:, :8] + updates[1][0]["b"])
    np.testing.assert_allclose(
        change.right[4:12], SCALE * 2 / 8 * (current["a"][:8] + updates[1][0]["a"]), rtol=1e-6
    )


def test_a_stack_larger_than_the_weight_becomes_dense():
    rng = np.random.default_rng(0)
    current = tensors(rng, 12, 12, 2)
    for clients, dense in ((3, False), (4, True)):  # 48 values a client against 144
        updates = [(tensors(rng, 12, 12, 2), 1.0) for _ in range(clients)]
        change = merged(current, updates).base["a"]
        assert (change.right is None) == dense
        assert change.nbytes == 4 * 144
        np.testing.assert_allclose(
            change.product(), slow_product(current, updates), rtol=1e-5, atol=1e-5
        )


def test_rounds_add_up_in_the_base():
    rng = np.random.default_rng(3)
    current = tensors(rng, 7, 6, 2)
    first, base = current["a"].copy(), np.zeros((7, 6))
    wanted = np.zeros((7, 6))
    for _ in range(4):
        updates = [(tensors(rng, 7, 6, 2), float(w)) for w in (1, 2, 4)]
        wanted += slow_product(current, updates)
        result = merged(current, updates)
        base += result.base["a"].product()
        current = {name: current[name] + result.delta[name] for name in current}
    np.testing.assert_array_equal(current["a"], first)
    effective = base + SCALE * current["b"].astype("f8") @ current["a"]
    assert np.linalg.norm(effective - wanted) < 1e-5 * np.linalg.norm(wanted)


def test_add_refuses_a_product_beyond_float32_and_the_old_state_stands():
    current = {"a": np.zeros((1, 2), "f4"), "b": np.zeros((2, 1), "f4")}
    good = {"a": np.ones((1, 2), "f4"), "b": np.ones((2, 1), "f4")}
    huge = {"a": np.full((1, 2), 1e20, "f4"), "b": np.full((2, 1), 1e20, "f4")}
    state = MERGER.add(MERGER.init(ParamSpec.of(current), current=current), good, 1)
    with pytest.raises(MergeError, match='pair "a", "b": expected a product within float32'):
        MERGER.add(state, huge, 1)
    assert (MERGER.finish(state).base["a"].product() == SCALE).all()
