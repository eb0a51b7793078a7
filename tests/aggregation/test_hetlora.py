# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregation.mergers.hetlora import HetLoRA
from protocol import ParamSpec
from protocol.factors import FactorPair

PAIRS = (FactorPair(down="a", up="b", scale=2.0),)
MERGER = HetLoRA(pairs=PAIRS)


def tensors(rng, d, k, r) -> dict[str, np.ndarray]:
    return {
        "a": rng.standard_normal((r, k)).astype("f4"),
        "b": rng.standard_normal((d, r)).astype("f4"),
    }


def merged(current, updates, merger=MERGER):
    state = merger.init(ParamSpec.of(current), current=current)
    for update, weight in updates:
        state = merger.add(state, update, weight)
    result = merger.finish(state)
    assert not result.base
    return {name: current[name] + result.delta[name] for name in current}, result.notes


def slow_means(current, updates) -> tuple[np.ndarray, np.ndarray]:
    """B and A, each padded by zeros and weighted by the norm of the dense product."""
    ups, downs, norms = [], [], []
    for update, _ in updates:
        rank = len(update["a"])
        up, down = np.zeros(current["b"].shape), np.zeros(current["a"].shape)
        for m in range(rank):
            up[:, m] = current["b"][:, m] + update["b"][:, m].astype("f8")
            down[m] = current["a"][m] + update["a"][m].astype("f8")
        ups.append(up)
        downs.append(down)
        norms.append(math.sqrt(math.fsum(value * value for value in (up @ down).flat)))
    total = math.fsum(norms)
    return (
        sum(norm / total * up for norm, up in zip(norms, ups, strict=True)),
        sum(norm / total * down for norm, down in zip(norms, downs, strict=True)),
    )


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    ranks=st.lists(st.integers(1, 3), min_size=1, max_size=6),
    d=st.integers(1, 8),
    k=st.integers(1, 8),
)
def test_factors_are_those_of_the_slow_oracle(seed, ranks, d, k):
    rng = np.random.default_rng(seed)
    current = tensors(rng, d, k, 3)
    updates = [(tensors(rng, d, k, rank), 1.0) for rank in ranks]
    new, notes = merged(current, updates)
    up, down = slow_means(current, updates)
    np.testing.assert_allclose(new["b"], up, atol=1e-5)
    np.testing.assert_allclose(new["a"], down, atol=1e-5)
    assert notes == ()


def test_ranks_4_8_and_16_in_one_round():
    rng = np.random.default_rng(0)
    current = tensors(rng, 40, 30, 16)
    updates = [(tensors(rng, 40, 30, rank), 1.0) for rank in (4, 8, 16)]
    new, _ = merged(current, updates)
    up, down = slow_means(current, updates)
    np.testing.assert_allclose(new["b"], up, atol=1e-5)
    np.testing.assert_allclose(new["a"], down, atol=1e-5)


def test_weights_count_for_other_tensors_alone():
    rng = np.random.default_rng(1)
    current = tensors(rng, 6, 5, 2) | {"head": np.zeros(3, "f4")}
    updates = [tensors(rng, 6, 5, 2) | {"head": np.full(3, float(i), "f4")} for i in range(2)]
    even, _ = merged(current, [(update, 1) for update in updates])
    uneven, _ = merged(current, [(updates[0], 1), (updates[1], 3)])
    for name in "ab":
        np.testing.assert_array_equal(even[name], uneven[name])
    assert even["head"].tolist() == [0.5] * 3
    assert uneven["head"].tolist() == [0.75] * 3


def test_a_client_whose_product_is_zero_weighs_nothing():
    rng = np.random.default_rng(2)
    current = tensors(rng, 6, 5, 2)
    update = tensors(rng, 6, 5, 2)
    nothing = {"a": np.ones((2, 5), "f4"), "b": -current["b"]}
    new, notes = merged(current, [(update, 1), (nothing, 1000)])
    for name in "ab":
        np.testing.assert_allclose(new[name], current[name] + update[name], rtol=1e-6, atol=1e-6)
    assert notes == ()


def test_pairs_without_any_product_are_averaged_by_weight_and_noted():
    rng = np.random.default_rng(3)
    pairs = tuple(FactorPair(down=f"{i}.a", up=f"{i}.b", scale=1.0) for i in range(2))
    current = {f"{i}.{n}": t for i in range(2) for n, t in tensors(rng, 6, 5, 2).items()}
    updates = []
    for value, weight in ((1.0, 1), (5.0, 3)):
        update = {f"{i}.{n}": t for i in range(2) for n, t in tensors(rng, 6, 5, 2).items()}
        update |= {"0.b": -current["0.b"], "0.a": np.full((2, 5), value, "f4")}
        updates.append((update, weight))
    new, notes = merged(current, updates, HetLoRA(pairs=pairs))
    assert notes == ('"0.a": every product is zero; averaged by weight',)
    np.testing.assert_allclose(new["0.a"], current["0.a"] + 4, rtol=1e-6)
    assert not new["0.b"].any()
    layer = {n: current[f"1.{n}"] for n in "ab"}
    up, _ = slow_means(layer, [({n: u[f"1.{n}"] for n in "ab"}, w) for u, w in updates])
    np.testing.assert_allclose(new["1.b"], up, atol=1e-5)


@pytest.mark.parametrize("size", [1e-30, 1e-15, 1e30])
def test_norms_neither_vanish_nor_overflow(size):
    rng = np.random.default_rng(4)
    current = {name: np.zeros_like(t) for name, t in tensors(rng, 6, 5, 2).items()}
    updates = [
        ({n: np.float32(size) * t for n, t in tensors(rng, 6, 5, 2).items()}, 1.0) for _ in range(3)
    ]
    new, notes = merged(current, updates)
    up, down = slow_means(current, updates)
    np.testing.assert_allclose(new["b"], up, atol=1e-5 * size)
    np.testing.assert_allclose(new["a"], down, atol=1e-5 * size)
    assert notes == ()
