# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.errors import MergeError
from aggregation.mergers.opcm import OPCM, projected
from protocol import ParamSpec

SHAPES = {"b.bias": (5,), "c.conv": (2, 2, 3), "w.tall": (6, 4), "w.wide": (3, 5)}


def updates_of(seed: int, count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [
        {name: rng.normal(size=shape).astype("f4") for name, shape in SHAPES.items()}
        for _ in range(count)
    ]


def merged(merger, updates) -> dict[str, np.ndarray]:
    state = merger.init(ParamSpec.of(updates[0]))
    for update in updates:
        state = merger.add(state, update, 1.0)
    return dict(merger.finish(state).delta)


def norm_of(tensors) -> float:
    return math.sqrt(sum(float(np.square(t.astype("f8")).sum()) for t in tensors.values()))


def slow(updates, alpha: float) -> dict[str, np.ndarray]:
    """As the author's code has it: full bases, and λ carried from step to step."""
    current = {name: value.astype("f8") for name, value in updates[0].items()}
    norms, previous = [norm_of(updates[0])], 1.0
    for update in updates[1:]:
        norms.append(norm_of(update))
        following = {}
        for name, old in current.items():
            new = update[name].astype("f8")
            if old.ndim == 2:
                u, s, vh = np.linalg.svd(old, full_matrices=True)
                split = int(np.argmax(s.cumsum() / s.sum() > alpha))
                inside = u.T @ new @ vh.T
                for i in range(min(inside.shape)):
                    inside[i, i] = 0
                inside[:split, :split] = 0
                new = u @ inside @ vh
            following[name] = previous * old + new
        length, mean = norm_of(following), sum(norms) / len(norms)
        current = {name: value * (mean / length) for name, value in following.items()}
        previous = length / mean
    return current


@given(st.integers(0, 1000), st.integers(1, 5), st.sampled_from([0, 0.2, 0.5, 0.9, 0.999]))
def test_the_merge_is_that_of_the_slow_oracle(seed, count, alpha):
    updates = updates_of(seed, count)
    found, expected = merged(OPCM(alpha=alpha), updates), slow(updates, alpha)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5)


@given(st.integers(0, 1000), st.integers(1, 5))
def test_its_norm_is_the_mean_of_the_norms_of_updates(seed, count):
    updates = updates_of(seed, count)
    mean = sum(map(norm_of, updates)) / count
    assert norm_of(merged(OPCM(), updates)) == pytest.approx(mean, rel=1e-5)


@given(st.integers(0, 1000), st.sampled_from([0, 0.3, 0.7, 0.99]))
def test_what_is_added_is_orthogonal_to_what_is_protected(seed, alpha):
    rng = np.random.default_rng(seed)
    merged_one, new = rng.normal(size=(6, 4)), rng.normal(size=(6, 4))
    before = merged_one.tobytes(), new.tobytes()
    added = projected(merged_one, new, alpha)
    left, values, right = np.linalg.svd(merged_one, full_matrices=False)
    protected = int((values.cumsum() / values.sum() <= alpha).sum())
    inside = left.T @ added @ right.T
    np.testing.assert_allclose(inside[:protected, :protected], 0, atol=1e-12)
    np.testing.assert_allclose(np.diag(inside), 0, atol=1e-12)
    # so that the two are orthogonal, and what was merged is not undone
    assert abs(float((added * merged_one).sum())) < 1e-9
    assert np.linalg.norm(added) <= np.linalg.norm(new) + 1e-12
    assert (merged_one.tobytes(), new.tobytes()) == before


def test_the_same_update_again_adds_nothing_to_a_matrix():
    update = {"w": np.random.default_rng(0).normal(size=(4, 3)).astype("f4")}
    found = merged(OPCM(), [update] * 5)["w"]
    np.testing.assert_allclose(found, update["w"], rtol=1e-5)


def test_only_directions_that_are_held_are_protected():
    # of rank one: the library's choice of the other directions must not matter
    held = np.outer([1.0, 2, 3], [1.0, 1])
    new = np.random.default_rng(1).normal(size=(3, 2))
    unit = held / np.linalg.norm(held)
    for alpha in (0, 0.5, 0.99):
        np.testing.assert_allclose(
            projected(held, new, alpha), new - float((new * unit).sum()) * unit, atol=1e-12
        )
    np.testing.assert_array_equal(projected(np.zeros((3, 2)), new, 0.5), new)


def test_updates_of_zeros_and_updates_that_cancel_give_zeros():
    zeros = {"w": np.zeros((2, 2), "f4"), "b": np.zeros(2, "f4")}
    assert norm_of(merged(OPCM(), [zeros, zeros])) == 0
    there, back = {"b": np.ones(2, "f4")}, {"b": -np.ones(2, "f4")}
    assert merged(OPCM(), [there, back])["b"].tolist() == [0, 0]


def test_a_tensor_that_changes_late_is_taken_as_it_is():
    none = {"w": np.zeros((2, 2), "f4"), "x": np.eye(2, dtype="f4")}
    late = {"w": np.eye(2, dtype="f4"), "x": np.zeros((2, 2), "f4")}
    found = merged(OPCM(), [none, late])
    np.testing.assert_allclose(found["w"], np.eye(2) / math.sqrt(2), rtol=1e-6)
    np.testing.assert_allclose(found["x"], np.eye(2) / math.sqrt(2), rtol=1e-6)


def test_another_order_gives_another_result():
    updates = updates_of(0, 3)
    first, second = merged(OPCM(), updates), merged(OPCM(), updates[::-1])
    assert np.abs(first["w.tall"] - second["w.tall"]).max() > 0.01


@pytest.mark.parametrize("alpha", [-0.1, 1, np.nan, "0.5", None, True])
def test_an_alpha_outside_its_range_is_refused(alpha):
    with pytest.raises(MergeError, match="alpha: expected from 0 to below 1"):
        OPCM(alpha=alpha)
