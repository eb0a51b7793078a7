# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregation.mergers.fedex_lora import FedExLoRA
from protocol import ParamSpec
from protocol.factors import FactorPair

SCALE = 2.0
MERGER = FedExLoRA(pairs=(FactorPair(down="a", up="b", scale=SCALE),))


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


def literal(current, updates):
    """B̄, Ā and s·(Σ p_i B_i A_i - B̄ Ā), dense float64, smaller ranks padded by zeros."""
    total = sum(weight for _, weight in updates)
    mean_up, mean_down = np.zeros(current["b"].shape), np.zeros(current["a"].shape)
    product = np.zeros((len(mean_up), mean_down.shape[1]))
    for update, weight in updates:
        rank = len(update["a"])
        up, down = np.zeros_like(mean_up), np.zeros_like(mean_down)
        up[:, :rank] = current["b"][:, :rank] + update["b"].astype("f8")
        down[:rank] = current["a"][:rank] + update["a"].astype("f8")
        mean_up += weight / total * up
        mean_down += weight / total * down
        product += weight / total * up @ down
    return mean_up, mean_down, SCALE * (product - mean_up @ mean_down)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    ranks=st.lists(st.integers(1, 3), min_size=2, max_size=7),
    d=st.integers(1, 30),
    k=st.integers(1, 30),
)
def test_factors_and_residual_are_those_of_the_literal_formula(seed, ranks, d, k):
    rng = np.random.default_rng(seed)
    current = tensors(rng, d, k, 3)
    updates = [(tensors(rng, d, k, rank), int(rng.integers(1, 50))) for rank in ranks]
    result = merged(current, updates)
    up, down, residual = literal(current, updates)
    np.testing.assert_allclose(current["b"] + result.delta["b"], up, atol=1e-5)
    np.testing.assert_allclose(current["a"] + result.delta["a"], down, atol=1e-5)
    np.testing.assert_allclose(result.base["a"].product(), residual, atol=1e-4)


@pytest.mark.parametrize("clients", [1, 2, 3, 40])  # of 40, the products are kept dense
def test_equal_clients_leave_no_residual(clients):
    rng = np.random.default_rng(0)
    current = tensors(rng, 20, 15, 3)
    update = tensors(rng, 20, 15, 3)
    weights = [0.1 + float(weight) for weight in rng.random(clients)]
    result = merged(current, [(update, weight) for weight in weights])
    assert result.base == {}
    for name, change in update.items():
        np.testing.assert_allclose(result.delta[name], change, rtol=1e-6)


@pytest.mark.parametrize("same", ["a", "b"])
def test_clients_that_agree_on_one_factor_leave_no_residual(same):
    rng = np.random.default_rng(1)
    current = tensors(rng, 20, 15, 3)
    shared = tensors(rng, 20, 15, 3)[same]
    updates = [(tensors(rng, 20, 15, 3) | {same: shared}, w) for w in (1.0, 2.0, 4.0)]
    change = merged(current, updates).base.get("a")
    size = SCALE * np.linalg.norm(current["b"].astype("f8") @ current["a"])
    # nothing but the rounding of the means to float32, where there is a change at all
    assert change is None or np.linalg.norm(change.product()) < 1e-6 * size


def test_a_layer_without_residual_is_left_out_and_another_is_there():
    rng = np.random.default_rng(2)
    pairs = tuple(FactorPair(down=f"{i}.a", up=f"{i}.b", scale=1.0) for i in range(2))
    current = {f"{i}.{n}": t for i in range(2) for n, t in tensors(rng, 20, 15, 2).items()}
    merger = FedExLoRA(pairs=pairs)
    state = merger.init(ParamSpec.of(current), current=current)
    for _ in range(2):
        update = {name: np.ones_like(array) for name, array in current.items()}
        update |= {f"1.{n}": t for n, t in tensors(rng, 20, 15, 2).items()}
        state = merger.add(state, update, 1.0)
    assert list(merger.finish(state).base) == ["1.a"]


def test_residual_has_at_most_the_columns_of_all_clients_and_is_dense_where_smaller():
    rng = np.random.default_rng(3)
    current = tensors(rng, 12, 12, 2)
    for clients, dense in ((2, False), (3, False), (4, True)):  # 48 values a client against 144
        updates = [(tensors(rng, 12, 12, 2), 1.0) for _ in range(clients)]
        change = merged(current, updates).base["a"]
        assert (change.right is None) == dense
        assert change.left.shape == (12, 12 if dense else 2 * clients)
        residual = literal(current, updates)[2]
        np.testing.assert_allclose(change.product(), residual, atol=1e-5)


def test_padding_of_small_ranks_does_not_outgrow_the_dense_form():
    rng = np.random.default_rng(4)
    current = tensors(rng, 64, 64, 32)
    # thirty-two columns are kept as factors; padded they would be a thousand
    updates = [(tensors(rng, 64, 64, 1), 1.0) for _ in range(32)]
    state = MERGER.init(ParamSpec.of(current), current=current)
    for update, weight in updates:
        state = MERGER.add(state, update, weight)
    tracemalloc.start()
    try:
        change = MERGER.finish(state).base["a"]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10 * 64 * 64 * 8
    assert change.right is None
    np.testing.assert_allclose(change.product(), literal(current, updates)[2], atol=1e-4)


def test_rounds_stay_exact_when_residuals_are_added_up():
    rng = np.random.default_rng(5)
    current = tensors(rng, 10, 9, 2)
    base = np.zeros((10, 9))
    for _ in range(5):
        updates = [(tensors(rng, 10, 9, 2), float(w)) for w in (1, 2, 4)]
        # what each client computes with: the base so far and its own factors
        wanted = base.copy()
        for update, weight in updates:
            up, down = (current[n] + update[n].astype("f8") for n in "ba")
            wanted += weight / 7 * SCALE * up @ down
        result = merged(current, updates)
        base = base + result.base["a"].product()
        current = {name: current[name] + result.delta[name] for name in current}
        found = base + SCALE * current["b"].astype("f8") @ current["a"]
        assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)
