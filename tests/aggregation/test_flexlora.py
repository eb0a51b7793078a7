# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregation.mergers.flexlora import FlexLoRA
from protocol import ParamSpec
from protocol.factors import FactorPair

PAIRS = (FactorPair(down="a", up="b", scale=2.0),)
MERGER = FlexLoRA(pairs=PAIRS)


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


def mean_product(current, updates) -> np.ndarray:
    """Σ p_i B_i A_i, dense float64."""
    total = sum(weight for _, weight in updates)
    product = np.zeros((len(current["b"]), current["a"].shape[1]))
    for update, weight in updates:
        rank = len(update["a"])
        up = current["b"][:, :rank] + update["b"].astype("f8")
        product += weight / total * up @ (current["a"][:rank] + update["a"].astype("f8"))
    return product


def dense_truncation(product, rank) -> tuple[np.ndarray, float]:
    """The best approximation of a rank, and its relative error, from an SVD of the whole."""
    U, S, Vt = np.linalg.svd(product, full_matrices=False)
    best = (U[:, :rank] * S[:rank]) @ Vt[:rank]
    return best, float(np.linalg.norm(product - best) / np.linalg.norm(product))


def said_error(notes) -> float:
    [note] = notes
    found = re.search(r"relative error at most (\S+)", note)
    assert found is not None
    return float(found[1])


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    ranks=st.lists(st.integers(1, 3), min_size=1, max_size=7),
    d=st.integers(1, 8),
    k=st.integers(1, 8),
    balanced=st.booleans(),
)
def test_product_and_error_are_those_of_the_dense_svd(seed, ranks, d, k, balanced):
    rng = np.random.default_rng(seed)
    current = tensors(rng, d, k, 3)
    updates = [(tensors(rng, d, k, rank), int(rng.integers(1, 50))) for rank in ranks]
    product = mean_product(current, updates)
    best, error = dense_truncation(product, 3)
    new, notes = merged(current, updates, FlexLoRA(pairs=PAIRS, balanced=balanced))
    scale = np.linalg.norm(product)
    assert np.linalg.norm(new["b"].astype("f8") @ new["a"] - best) <= 1e-5 * scale + 1e-6
    assert said_error(notes) == pytest.approx(error, abs=1e-5)


@pytest.mark.parametrize("d", [20, 200])  # the mean product dense, and as stacked factors
def test_ranks_4_8_and_16_in_one_round(d):
    rng = np.random.default_rng(1)
    current = tensors(rng, d, d + 3, 16)
    updates = [(tensors(rng, d, d + 3, rank), w) for rank, w in ((4, 1), (8, 2), (16, 5))]
    best, error = dense_truncation(mean_product(current, updates), 16)
    new, notes = merged(current, updates)
    assert error > 0.01
    assert said_error(notes) == pytest.approx(error, rel=1e-5)
    assert np.linalg.norm(new["b"].astype("f8") @ new["a"] - best) < 1e-5 * np.linalg.norm(best)


def test_the_leading_part_is_the_best_for_a_client_of_a_smaller_rank():
    rng = np.random.default_rng(2)
    current = tensors(rng, 30, 20, 4)
    updates = [(tensors(rng, 30, 20, 4), 1.0) for _ in range(3)]
    product = mean_product(current, updates)
    new, _ = merged(current, updates)
    for rank in (1, 2, 3):
        best, _ = dense_truncation(product, rank)
        found = new["b"][:, :rank].astype("f8") @ new["a"][:rank]
        assert np.linalg.norm(found - best) < 1e-5 * np.linalg.norm(best)


def test_nothing_is_lost_when_the_rank_suffices():
    rng = np.random.default_rng(3)
    current = tensors(rng, 40, 30, 12)
    updates = [(tensors(rng, 40, 30, rank), 1.0 + rank) for rank in (4, 5, 3)]
    wanted = mean_product(current, updates)
    new, notes = merged(current, updates)
    found = new["b"].astype("f8") @ new["a"]
    assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)
    assert said_error(notes) == 0


def test_singular_values_stand_in_b_or_in_both_when_balanced():
    rng = np.random.default_rng(4)
    current = tensors(rng, 30, 20, 4)
    updates = [(tensors(rng, 30, 20, 4), 1.0) for _ in range(3)]
    S = np.linalg.svd(mean_product(current, updates), compute_uv=False)[:4]
    paper, _ = merged(current, updates)
    np.testing.assert_allclose(np.linalg.norm(paper["a"], axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(paper["b"], axis=0), S, rtol=1e-5)
    both, _ = merged(current, updates, FlexLoRA(pairs=PAIRS, balanced=True))
    np.testing.assert_allclose(np.linalg.norm(both["a"], axis=1), np.sqrt(S), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(both["b"], axis=0), np.sqrt(S), rtol=1e-5)


@pytest.mark.parametrize("balanced", [False, True])
def test_directions_that_nobody_uses_can_still_be_trained(balanced):
    rng = np.random.default_rng(5)
    current = tensors(rng, 30, 20, 4)
    updates = [(tensors(rng, 30, 20, 2), 1.0)]
    new, _ = merged(current, updates, FlexLoRA(pairs=PAIRS, balanced=balanced))
    assert not new["b"][:, 2:].any()
    np.testing.assert_array_equal(new["a"][2:], current["a"][2:])
    # nothing was learned at all: the factors are where they started
    zero = {"a": np.zeros((4, 20), "f4"), "b": -current["b"]}
    new, notes = merged(current, [(zero, 1.0)], FlexLoRA(pairs=PAIRS, balanced=balanced))
    assert not new["b"].any()
    np.testing.assert_array_equal(new["a"], current["a"])
    assert said_error(notes) == 0


def test_the_note_names_the_pair_that_lost_most():
    rng = np.random.default_rng(6)
    pairs = tuple(FactorPair(down=f"{i}.a", up=f"{i}.b", scale=1.0) for i in range(2))
    current = {f"{i}.{n}": t for i in range(2) for n, t in tensors(rng, 20, 15, 2).items()}
    updates = []
    for _ in range(2):  # clients agree on the first layer
        update = {name: np.ones_like(array) for name, array in current.items()}
        update |= {f"1.{n}": t for n, t in tensors(rng, 20, 15, 2).items()}
        updates.append((update, 1.0))
    _, [note] = merged(current, updates, FlexLoRA(pairs=pairs))
    layer = {n: current[f"1.{n}"] for n in "ab"}
    error = dense_truncation(
        mean_product(layer, [({n: u[f"1.{n}"] for n in "ab"}, w) for u, w in updates]), 2
    )[1]
    assert f"relative error at most {error:.4g}"[:-1] in note
    assert '("1.a")' in note
    mean = float(note.rpartition(" ")[2])
    assert mean == pytest.approx(error / 2, rel=1e-5)
