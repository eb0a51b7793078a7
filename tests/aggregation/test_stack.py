# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.stack import Stack

ROWS = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32)


def stacked(rows: np.ndarray, budget: int) -> Stack:
    stack = Stack(rows.shape[1], budget=budget)
    for row in rows:
        stack = stack.with_row(row)
    return stack


@given(st.integers(0, 7 * 20 + 1))
def test_rows_are_those_that_were_added_wherever_they_are_kept(budget: int) -> None:
    stack = stacked(ROWS, budget)
    assert len(stack) == 7 and stack.width == 5
    np.testing.assert_array_equal(np.stack(list(stack)), ROWS)
    np.testing.assert_array_equal(stack.row(6), ROWS[6])


@pytest.mark.parametrize("budget", [0, 60, 1000])
def test_column_blocks_cover_every_column_once(
    budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aggregation.stack.BLOCK_VALUES", 14)
    seen = list(stacked(ROWS, budget).column_blocks())
    assert [columns for columns, _ in seen] == [slice(0, 2), slice(2, 4), slice(4, 5)]
    np.testing.assert_array_equal(np.concatenate([block for _, block in seen], axis=1), ROWS)


@pytest.mark.parametrize("budget", [0, 60, 1000])
def test_two_stacks_that_grow_out_of_one_do_not_see_each_other(budget: int) -> None:
    base = stacked(ROWS[:4], budget)
    one, other = base.with_row(ROWS[4]), base.with_row(ROWS[5])
    np.testing.assert_array_equal(np.stack(list(one)), ROWS[:5])
    np.testing.assert_array_equal(np.stack(list(other)), ROWS[[0, 1, 2, 3, 5]])
    assert len(base) == 4


def test_a_row_that_is_changed_afterwards_stays_as_it_was_added() -> None:
    row = ROWS[0].copy()
    stack = Stack(5).with_row(row)
    row[:] = 0
    np.testing.assert_array_equal(stack.row(0), ROWS[0])
    with pytest.raises(IndexError, match="row 1 of 1"):
        stack.row(1)


def test_memory_stays_within_the_budget() -> None:
    width, budget = 10_000, 400_000
    row = np.zeros(width, np.float32)
    tracemalloc.start()
    stack = Stack(width, budget=budget)
    for _ in range(200):
        stack = stack.with_row(row)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(stack) == 200
    assert peak < budget + 4 * row.nbytes
