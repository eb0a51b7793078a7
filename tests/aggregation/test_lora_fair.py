# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregation.errors import MergeError
from aggregation.mergers.lora_fair import LoRAFair
from protocol import ParamSpec
from protocol.factors import FactorPair

PAIRS = (FactorPair(down="a", up="b", scale=2.0),)


def tensors(rng, d, k, r) -> dict[str, np.ndarray]:
    return {
        "a": rng.standard_normal((r, k)).astype("f4"),
        "b": rng.standard_normal((d, r)).astype("f4"),
    }


def merged(current, updates, ridge=0.01) -> dict[str, np.ndarray]:
    merger = LoRAFair(pairs=PAIRS, ridge=ridge)
    state = merger.init(ParamSpec.of(current), current=current)
    for update, weight in updates:
        state = merger.add(state, update, weight)
    result = merger.finish(state)
    assert not result.base
    return {name: current[name] + result.delta[name] for name in current}


def means(current, updates) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """B̄, Ā and Σ p_i B_i A_i, dense float64."""
    total = sum(weight for _, weight in updates)
    own = [
        (w / total, current["b"] + u["b"].astype("f8"), current["a"] + u["a"].astype("f8"))
        for u, w in updates
    ]
    return (
        sum(p * up for p, up, _ in own),
        sum(p * down for p, _, down in own),
        sum(p * up @ down for p, up, down in own),
    )


def least_squares(up, down, product, ridge) -> np.ndarray:
    """The ΔB that minimises ‖(B̄ + ΔB) Ā - product‖² + ridge·‖ΔB‖², by a general solver."""
    rank = len(down)
    rows = np.vstack([down.T, np.sqrt(ridge) * np.eye(rank)])
    wanted = np.vstack([(product - up @ down).T, np.zeros((rank, len(up)))])
    return np.linalg.lstsq(rows, wanted, rcond=None)[0].T


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 7),
    d=st.integers(1, 8),
    k=st.integers(1, 8),
    r=st.integers(1, 4),
    ridge=st.sampled_from([0.01, 0.3, 5.0]),
)
def test_correction_is_that_of_least_squares_with_a_ridge(seed, count, d, k, r, ridge):
    rng = np.random.default_rng(seed)
    current = tensors(rng, d, k, r)
    updates = [(tensors(rng, d, k, r), int(rng.integers(1, 50))) for _ in range(count)]
    up, down, product = means(current, updates)
    correction = least_squares(up, down, product, ridge)
    closed = (product - up @ down) @ down.T @ np.linalg.inv(down @ down.T + ridge * np.eye(r))
    found = merged(current, updates, ridge)
    np.testing.assert_allclose(correction, closed, atol=1e-6)
    np.testing.assert_allclose(found["b"], up + correction, atol=1e-4, rtol=1e-5)
    np.testing.assert_allclose(found["a"], down, atol=1e-5)


def test_correction_brings_the_product_nearer_to_the_mean_and_a_large_ridge_leaves_it():
    rng = np.random.default_rng(0)
    current = tensors(rng, 12, 10, 3)
    updates = [(tensors(rng, 12, 10, 3), float(w)) for w in (1, 2, 4)]
    up, down, product = means(current, updates)
    misses = []
    for ridge in (1e-6, 0.01, 10.0, 1e12):
        new = merged(current, updates, ridge)
        misses.append(float(np.linalg.norm(new["b"].astype("f8") @ new["a"] - product)))
    plain = float(np.linalg.norm(up @ down - product))
    assert misses[0] < misses[1] * (1 + 1e-6) < misses[2] < plain
    assert misses[3] == pytest.approx(plain, rel=1e-5)
    # what is left is what no B can express beside this A
    out_of_reach = product @ (np.eye(10) - np.linalg.pinv(down) @ down)
    assert misses[0] == pytest.approx(float(np.linalg.norm(out_of_reach)), rel=1e-4)


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_factors_of_deficient_rank_give_no_wild_corrections(size):
    rng = np.random.default_rng(1)
    row = rng.standard_normal(10)
    current = {"a": np.zeros((3, 10), "f4"), "b": np.zeros((12, 3), "f4")}
    updates = []
    for weight in (1.0, 2.0):
        down = np.outer(rng.standard_normal(3), row) * size  # of rank one, for all clients
        up = rng.standard_normal((12, 3))
        updates.append(({"a": down.astype("f4"), "b": up.astype("f4")}, weight))
    up, _, product = means(current, updates)
    new = merged(current, updates)
    assert np.linalg.norm(new["b"]) < 10 * np.linalg.norm(up)
    miss = np.linalg.norm(new["b"].astype("f8") @ new["a"] - product)
    assert miss <= (1.0 if size < 1 else 1e-2) * np.linalg.norm(up) * np.linalg.norm(new["a"])


@pytest.mark.parametrize("ridge", [0, -0.01, np.nan, np.inf, "1", None, True])
def test_a_ridge_that_is_not_positive_and_finite_is_refused(ridge):
    with pytest.raises(MergeError, match="ridge: expected a finite number above 0"):
        LoRAFair(pairs=PAIRS, ridge=ridge)
