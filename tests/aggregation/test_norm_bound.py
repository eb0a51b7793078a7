# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from aggregation.errors import MergeError
from aggregation.robust.norm_bound import NormBound
from protocol import ParamSpec

ROWS = npst.arrays(
    np.float32,
    st.tuples(st.integers(1, 7), st.integers(1, 5)),
    elements=st.floats(-1e3, 1e3, width=32),
)


def merged(merger, rows) -> np.ndarray:
    rows = np.asarray(rows, np.float32)
    state = merger.init(ParamSpec.of({"a": rows[0]}))
    for number, row in enumerate(rows):
        state = merger.add(state, {"a": row}, 1.0, client=f"c{number}")
    return merger.finish(state).delta["a"]


def slow(rows: list[list[float]], bound: float) -> list[float]:
    norms = [math.sqrt(math.fsum(value**2 for value in row)) for row in rows]
    if bound == 0:
        ordered = sorted(norms)
        bound = (ordered[(len(rows) - 1) // 2] + ordered[len(rows) // 2]) / 2
    sums = [0.0] * len(rows[0])
    for row, norm in zip(rows, norms, strict=True):
        for i, value in enumerate(row):
            sums[i] += value * (min(1, bound / norm) if norm > 0 else 1)
    return [value / len(rows) for value in sums]


@given(ROWS, st.sampled_from([0, 0.5, 1, 40.0, 1e9]))
def test_the_mean_is_that_of_the_slow_oracle(rows, bound):
    found = merged(NormBound(bound=bound), rows)
    scale = float(np.abs(rows).max())
    np.testing.assert_allclose(
        found, slow(rows.tolist(), bound), rtol=1e-5, atol=1e-6 * scale + 1e-44
    )


@given(ROWS, st.floats(0.01, 100))
def test_no_update_counts_for_more_than_the_bound(rows, bound):
    assert np.linalg.norm(merged(NormBound(bound=bound), rows)) <= bound * (1 + 1e-6)
    alone = merged(NormBound(bound=bound), rows[:1])
    with_others = merged(NormBound(bound=bound), [rows[0], *np.zeros_like(rows)])
    np.testing.assert_allclose(with_others, alone / (len(rows) + 1), rtol=1e-5, atol=1e-30)


def test_an_attacker_is_held_back_and_carries_the_plain_mean_away():
    honest = np.random.default_rng(0).normal(1, 0.1, (8, 20)).astype(np.float32)
    rows = np.vstack([honest, np.full((2, 20), -1e6, np.float32)])
    norm = np.linalg.norm(honest.mean(axis=0))
    assert np.linalg.norm(merged(NormBound(), rows) - honest.mean(axis=0)) < 0.5 * norm
    assert np.linalg.norm(merged(NormBound(bound=4.5), rows) - honest.mean(axis=0)) < 0.5 * norm
    assert np.linalg.norm(rows.mean(axis=0)) > 1e5


def test_the_norm_is_that_of_all_tensors_together():
    update = {"a": np.full(4, 3, "f4"), "b": np.full((2, 2), 4, "f4")}  # norm 10
    merger = NormBound(bound=5)
    result = merger.finish(merger.add(merger.init(ParamSpec.of(update)), update, 1)).delta
    np.testing.assert_array_equal(result["a"], np.full(4, 1.5, "f4"))
    np.testing.assert_array_equal(result["b"], np.full((2, 2), 2, "f4"))


def test_updates_of_zeros_are_merged_when_the_bound_comes_from_them():
    zeros = np.zeros((3, 2))
    np.testing.assert_array_equal(merged(NormBound(), zeros), [0, 0])
    # where most change nothing the median is 0, and nothing passes
    np.testing.assert_array_equal(merged(NormBound(), [*zeros, (1, 1)]), [0, 0])


@pytest.mark.parametrize("bound", [-1, np.nan, np.inf, "1", None, True])
def test_a_bound_that_is_not_a_finite_number_of_0_or_above_is_refused(bound):
    with pytest.raises(MergeError, match="bound: expected"):
        NormBound(bound=bound)
