# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime import DataError, batch_plan, evaluation_plan

SIZES = (st.integers(1, 50), st.integers(1, 20))


@given(*SIZES, st.integers(1, 4), st.integers(0, 2**32))
def test_every_epoch_is_a_permutation_and_padding_weighs_nothing(samples, batch, epochs, seed):
    indices, weights = batch_plan(samples, batch, epochs, np.random.default_rng(seed))
    per_epoch = -(-samples // batch)
    assert indices.shape == weights.shape == (epochs * per_epoch, batch)
    assert (indices.dtype, weights.dtype) == (np.int64, np.float32)
    rng = np.random.default_rng(seed)
    for epoch in range(epochs):
        rows = slice(epoch * per_epoch, (epoch + 1) * per_epoch)
        used = weights[rows].ravel() == 1
        assert used.tolist() == [i < samples for i in range(per_epoch * batch)]
        np.testing.assert_array_equal(indices[rows].ravel()[used], rng.permutation(samples))
        assert not indices[rows].ravel()[~used].any()
    assert weights.sum() == epochs * samples


@given(*SIZES)
def test_evaluation_sees_every_sample_once_in_order(samples, batch):
    indices, weights = evaluation_plan(samples, batch)
    assert indices.shape == weights.shape == (-(-samples // batch), batch)
    assert indices[weights == 1].tolist() == list(range(samples))
    assert not indices[weights == 0].any()


def test_the_same_generator_state_gives_the_same_plan():
    plans = [batch_plan(11, 4, 2, np.random.default_rng(5))[0].tobytes() for _ in range(2)]
    assert plans[0] == plans[1]


@pytest.mark.parametrize("sizes", [(0, 8, 1), (5, 0, 1), (5, 8, 0), (-1, 8, 1)])
def test_plans_refuse_when_there_is_nothing_to_plan(sizes):
    with pytest.raises(DataError, match="expected 1 or more"):
        batch_plan(*sizes, np.random.default_rng(0))
    if sizes[2]:
        with pytest.raises(DataError, match="expected 1 or more"):
            evaluation_plan(*sizes[:2])


def test_plan_ends_early_when_steps_are_limited() -> None:
    whole = batch_plan(11, 4, 3, np.random.default_rng(5))
    cut = batch_plan(11, 4, 3, np.random.default_rng(5), most_steps=4)
    assert [len(part) for part in cut] == [4, 4]
    for part, of in zip(cut, whole, strict=True):
        np.testing.assert_array_equal(part, of[:4])
    longer = batch_plan(11, 4, 3, np.random.default_rng(5), most_steps=100)
    assert len(longer[0]) == len(whole[0]) == 9
