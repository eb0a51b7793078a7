# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime import DataError, private_batches
from edge_runtime.keystream import repeatable_keystream
from edge_runtime.private_batches import poisson_draws
from protocol.example_privacy import ExamplePrivacy
from protocol.manifest import TrainingSpec


def training(batch: int, fewest: int, steps: int) -> TrainingSpec:
    privacy = ExamplePrivacy(
        noise_multiplier=1.0, clip=1.0, fewest_samples=fewest, steps=steps, rounds=1
    )
    return TrainingSpec(batch_size=batch, optimizer="sgd", learning_rate=0.1, privacy=privacy)


@given(
    batch=st.integers(1, 9), more=st.integers(0, 40), steps=st.integers(1, 6), seed=st.integers(0)
)
def test_calls_of_a_step_hold_what_was_drawn_each_once(
    batch: int, more: int, steps: int, seed: int
) -> None:
    samples = batch + more
    drawn = private_batches(samples, training(batch, batch, steps), repeatable_keystream(seed))
    again = list(poisson_draws(samples, batch, steps, repeatable_keystream(seed)))
    assert drawn.indices.dtype == np.int64
    assert drawn.indices.shape == drawn.weights.shape == (len(drawn.applies), batch)
    ends = np.flatnonzero(drawn.applies)
    assert len(ends) == steps == len(again)
    assert ends[-1] == len(drawn.applies) - 1
    begin = 0
    for end, expected in zip(ends, again, strict=True):
        part = slice(begin, end + 1)
        rows = drawn.indices[part][drawn.weights[part] > 0]
        np.testing.assert_array_equal(rows, expected)
        # No call is there that a step does not need.
        assert end + 1 - begin == max(-(-len(expected) // batch), 1)
        begin = end + 1
    assert not drawn.indices[drawn.weights == 0].any()


def test_every_sample_is_drawn_at_the_rate_that_is_accounted_for() -> None:
    samples, batch, steps = 30, 6, 4_000
    draws = poisson_draws(samples, batch, steps, repeatable_keystream(3))
    taken = np.zeros((steps, samples), bool)
    for row, drawn in zip(taken, draws, strict=True):
        row[drawn] = True
    rate = batch / samples
    # Five deviations, of each sample's share and of the sizes' variance, which is binomial.
    assert np.abs(taken.mean(axis=0) - rate).max() < 5 * (rate * (1 - rate) / steps) ** 0.5
    sizes = taken.sum(axis=1)
    variance = samples * rate * (1 - rate)
    assert abs(sizes.var() - variance) < 5 * variance * (2 / steps) ** 0.5
    assert sizes.min() == 0 or sizes.max() > batch
    # One sample says nothing of another, nor one step of the next.
    assert abs(np.corrcoef(taken[:, 0], taken[:, 1])[0, 1]) < 5 / steps**0.5
    assert abs(np.corrcoef(taken[:-1, 0], taken[1:, 0])[0, 1]) < 5 / steps**0.5


def test_all_are_drawn_when_as_many_are_expected() -> None:
    for drawn in poisson_draws(5, 5, 3, repeatable_keystream(0)):
        np.testing.assert_array_equal(drawn, np.arange(5))


def test_step_that_draws_nobody_is_a_call_without_weight() -> None:
    drawn = private_batches(100, training(1, 1, 50), repeatable_keystream(1))
    empty = ~drawn.weights.any(axis=1)
    assert empty.any()
    assert drawn.applies[empty].all()


def test_noise_is_drawn_for_calls_that_apply_alone() -> None:
    drawn = private_batches(12, training(4, 4, 20), repeatable_keystream(0))
    assert not drawn.applies.all()
    seen = []
    for call, applies in enumerate(drawn.applies):
        noise = drawn.noise(call, 12)
        assert (noise.dtype, noise.shape) == (np.float32, (12,))
        assert noise.any() == bool(applies)
        seen.extend(noise[noise != 0])
    assert len(set(seen)) == len(seen) == 20 * 12


def test_calls_carry_the_rows_by_their_port_names() -> None:
    data = {"x": np.arange(24.0, dtype=np.float32).reshape(12, 2), "labels": np.arange(12)}
    drawn = private_batches(12, training(4, 4, 3), repeatable_keystream(0))
    for call, rows, weight in zip(
        drawn.calls(data, ["x"], 2), drawn.indices, drawn.weights, strict=True
    ):
        assert set(call) == {"batch/x", "labels", "weight", "applies", "noise"}
        np.testing.assert_array_equal(call["batch/x"], data["x"][rows])
        np.testing.assert_array_equal(call["labels"], rows)
        np.testing.assert_array_equal(call["weight"], weight)


def test_fewer_samples_than_accounted_for_are_refused() -> None:
    with pytest.raises(DataError, match=r"at least 10 samples.*found 9"):
        private_batches(9, training(4, 10, 1), repeatable_keystream(0))
    assert len(private_batches(10, training(4, 10, 1), repeatable_keystream(0)).applies)


def test_training_that_is_not_private_has_no_draws() -> None:
    plain = dataclasses.replace(training(4, 4, 1), privacy=None)
    with pytest.raises(ValueError, match="privacy"):
        private_batches(9, plain, repeatable_keystream(0))
    with pytest.raises(ValueError, match="expected 1 to 3 samples a step, found 4"):
        list(poisson_draws(3, 4, 1, repeatable_keystream(0)))
