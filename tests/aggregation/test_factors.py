# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregation.errors import MergeError
from aggregation.mergers.factors import (
    Factors,
    ProductSum,
    base_change,
    product_norm,
    truncated,
)
from protocol import SpecError
from protocol.factors import FactorPair


@pytest.mark.parametrize("scale", [0, -1.0, np.nan, np.inf, "1", True, None])
def test_pair_is_refused_when_its_scale_is_not_positive_and_finite(scale):
    with pytest.raises(SpecError, match="scale"):
        FactorPair(down="a", up="b", scale=scale)


def test_pair_is_refused_when_both_factors_are_one_tensor():
    with pytest.raises(SpecError, match="twice"):
        FactorPair(down="a", up="a", scale=1.0)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    d=st.integers(1, 9),
    k=st.integers(1, 9),
    q=st.integers(1, 12),
    rank=st.integers(1, 12),
    balanced=st.booleans(),
    dense=st.booleans(),
)
def test_truncation_is_that_of_the_dense_svd(seed, d, k, q, rank, balanced, dense):
    rng = np.random.default_rng(seed)
    left, right = rng.standard_normal((d, q)), rng.standard_normal((q, k))
    product = left @ right
    U, S, Vt = np.linalg.svd(product)
    best = (U[:, : len(S)][:, :rank] * S[:rank]) @ Vt[: len(S)][:rank]
    found = truncated(product if dense else left, None if dense else right, rank, balanced=balanced)
    assert (found.up.shape, found.down.shape) == ((d, rank), (rank, k))
    np.testing.assert_allclose(found.up @ found.down, best, atol=1e-10 * S[0])
    wanted = np.linalg.norm(product - best) / np.linalg.norm(product)
    assert found.error == pytest.approx(wanted, abs=1e-10)
    norms = np.linalg.norm(found.up, axis=0), np.linalg.norm(found.down, axis=1)
    kept = found.kept
    assert kept == min(rank, d, k, q)
    wanted_norms = (np.sqrt(S), np.sqrt(S)) if balanced else (S, np.ones(len(S)))
    for found_norms, by in zip(norms, wanted_norms, strict=True):
        np.testing.assert_allclose(found_norms[:kept], by[:kept], atol=1e-10 * S[0], rtol=1e-9)
        assert not found_norms[kept:].any()
    peaks = found.up[np.abs(found.up).argmax(axis=0), np.arange(rank)]
    assert (peaks[:kept] > 0).all()


def test_truncation_counts_rounding_errors_as_zero():
    rng = np.random.default_rng(0)
    up, down = rng.standard_normal((9, 2)), rng.standard_normal((2, 8))
    found = truncated(np.hstack([up, up]), np.vstack([down, 3 * down]), 4)
    assert found.kept == 2
    assert not found.up[:, 2:].any()
    assert found.error == 0
    nothing = truncated(np.zeros((9, 2)), down, 2)
    assert (nothing.kept, nothing.error) == (0, 0.0)


def test_truncation_names_a_decomposition_that_fails(monkeypatch):
    def fails(*_, **__):
        raise np.linalg.LinAlgError("SVD did not converge")

    monkeypatch.setattr(np.linalg, "svd", fails)
    with pytest.raises(MergeError, match="did not converge"):
        truncated(np.ones((3, 2)), np.ones((2, 3)), 1)


@given(
    seed=st.integers(0, 2**32 - 1), d=st.integers(1, 9), k=st.integers(1, 9), q=st.integers(1, 5)
)
def test_product_norm_is_that_of_the_dense_product(seed, d, k, q):
    rng = np.random.default_rng(seed)
    up, down = rng.standard_normal((d, q)), rng.standard_normal((q, k))
    bound = np.linalg.norm(up) * np.linalg.norm(down)
    assert product_norm(up, down) == pytest.approx(np.linalg.norm(up @ down), abs=1e-7 * bound)
    assert product_norm(0 * up, down) == 0


def test_sums_of_products_are_kept_in_the_smaller_form():
    rng = np.random.default_rng(1)
    total, weight, sums = np.zeros((8, 24)), 0.0, ProductSum(shape=(8, 24))
    for count in range(1, 7):
        up, down = rng.standard_normal((8, 2)), rng.standard_normal((2, 24))
        sums = sums.plus(up, down, float(count))
        total, weight = total + count * up @ down, weight + count
        # factors of rank q take 32·q values, the product 192
        assert (sums.dense is None) == (count <= 3)
        assert len(sums.terms) == (count if count <= 3 else 0)
        mean = sums.mean(weight)
        np.testing.assert_allclose(mean.product(), total / weight, atol=1e-12)
        np.testing.assert_allclose(mean.times(np.ones((24, 2)))[:, 1], total.sum(1) / weight)


def test_sums_of_products_refuse_to_overflow():
    huge = np.full((2, 2), 1e38)
    with pytest.raises(MergeError, match="finite weighted sum of products"):
        ProductSum(shape=(2, 2)).plus(huge, huge, 1e300)


def test_base_change_takes_the_smaller_form_and_names_what_float32_cannot_hold():
    rng = np.random.default_rng(2)
    pair = FactorPair(down="q.A", up="q.B", scale=2.0)
    for rank, dense in ((4, False), (5, True)):  # 20·q values against 90
        factors = Factors(rng.standard_normal((9, rank)), rng.standard_normal((rank, 10)))
        change = base_change(pair, factors)
        assert (change.right is None) == dense
        assert change.nbytes == 4 * (90 if dense else 19 * rank)
        np.testing.assert_allclose(change.product(), 2.0 * factors.product(), rtol=1e-5, atol=1e-5)
        assert change.product() is not change.left
    for factors in (
        Factors(np.full((1, 1), 1e39), None),
        Factors(np.full((9, 1), 1e39), np.ones((1, 10))),
    ):
        with pytest.raises(MergeError, match=r'tensor "q\.A"'):
            base_change(pair, factors)
