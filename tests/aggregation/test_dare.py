# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.errors import MergeError
from aggregation.mergers.dare import DARE
from aggregation.mergers.ties import TIES
from aggregation.mergers.weighted_mean import WeightedMean
from protocol import ParamSpec


def merged(merger, updates, *, rounds=0, weights=None) -> np.ndarray:
    """Of updates by client name."""
    spec = ParamSpec.of({"a": next(iter(updates.values()))})
    memory = {"rounds": np.array(float(rounds))}
    state = merger.init(spec, memory=memory)
    for number, (client, row) in enumerate(updates.items()):
        weight = 1.0 if weights is None else weights[number]
        state = merger.add(state, {"a": row}, weight, client=client)
    result = merger.finish(state)
    assert result.memory["rounds"] == rounds + 1
    return result.delta["a"]


def ones(size=1000, count=1) -> dict[str, np.ndarray]:
    return {f"c{number}": np.ones(size, "f4") for number in range(count)}


@pytest.mark.parametrize("drop", [0, 0.5, 0.9])
def test_the_share_that_stays_is_enlarged_to_the_same_mean(drop):
    found = merged(DARE(drop=drop), ones(size=100_000))
    assert set(found.tolist()) <= {0.0, float(np.float32(1 / (1 - drop)))}
    # five deviations of a binomial share
    slack = 5 * np.sqrt(drop * (1 - drop) / 100_000)
    assert np.count_nonzero(found) / 100_000 == pytest.approx(1 - drop, abs=slack)
    assert found.mean() == pytest.approx(1, abs=slack / (1 - drop) + 1e-6)


def test_what_is_dropped_depends_on_client_and_round_alone():
    first = merged(DARE(), ones()) != 0
    assert np.array_equal(first, merged(DARE(), ones()) != 0)
    other_values = {"c0": np.full(1000, -7, "f4")}
    assert np.array_equal(first, merged(DARE(), other_values) != 0)
    assert not np.array_equal(first, merged(DARE(), {"d0": np.ones(1000, "f4")}) != 0)
    assert not np.array_equal(first, merged(DARE(), ones(), rounds=1) != 0)
    # neither the hash nor the stream may change from one release to the next
    assert np.flatnonzero(first)[:5].tolist() == [4, 10, 24, 28, 36]


@pytest.mark.parametrize("then", ["mean", "ties"])
def test_order_of_arrival_changes_rounding_alone(then):
    rng = np.random.default_rng(0)
    updates = {f"c{n}": rng.normal(size=200).astype("f4") for n in range(6)}
    backwards = dict(reversed(updates.items()))
    merger = DARE(drop=0.5, then=then, density=0.5)
    np.testing.assert_allclose(
        merged(merger, updates), merged(merger, backwards), rtol=1e-6, atol=1e-7
    )


@given(st.integers(1, 5), st.integers(0, 50))
def test_it_is_the_mean_or_ties_of_what_each_client_is_left_with(count, seed):
    rng = np.random.default_rng(seed)
    updates = {f"c{n}": rng.normal(size=30).astype("f4") for n in range(count)}
    weights = rng.integers(1, 9, count).tolist()
    left = {c: merged(DARE(drop=0.6), {c: row}) for c, row in updates.items()}
    for merger, plain in (
        (DARE(drop=0.6), WeightedMean()),
        (DARE(drop=0.6, then="ties", density=0.3, scaling=0.7), TIES(density=0.3, scaling=0.7)),
    ):
        state = plain.init(ParamSpec.of({"a": np.zeros(30, "f4")}))
        for weight, row in zip(weights, left.values(), strict=True):
            state = plain.add(state, {"a": row}, weight)
        found = merged(merger, updates, weights=weights)
        assert found.tobytes() == plain.finish(state).delta["a"].tobytes()


def test_nothing_dropped_is_the_weighted_mean():
    rng = np.random.default_rng(0)
    updates = {f"c{n}": rng.normal(size=20).astype("f4") for n in range(4)}
    found = merged(DARE(drop=0), updates)
    np.testing.assert_allclose(found, np.mean(list(updates.values()), axis=0), rtol=1e-5, atol=1e-7)


def test_no_value_of_a_client_is_dropped_for_ever():
    kept = sum(merged(DARE(drop=0.9), ones(100), rounds=n) != 0 for n in range(150))
    assert kept.min() > 0


def test_the_first_round_needs_no_memory():
    merger = DARE()
    spec = ParamSpec.of({"a": np.zeros(1000, "f4")})
    state = merger.add(merger.init(spec), {"a": np.ones(1000, "f4")}, 1.0, client="c0")
    assert merger.finish(state).delta["a"].tobytes() == merged(DARE(), ones()).tobytes()


def test_add_refuses_clients_without_a_name_and_values_too_large_once_enlarged():
    merger = DARE(drop=0.99)
    spec = ParamSpec.of({"a": np.zeros(1000, "f4")})
    with pytest.raises(MergeError, match="dare: expected the client's name"):
        merger.add(merger.init(spec), {"a": np.ones(1000, "f4")}, 1.0)
    with pytest.raises(MergeError, match='tensor "a"'):
        merger.add(merger.init(spec), {"a": np.full(1000, 3e37, "f4")}, 1.0, client="c")


@pytest.mark.parametrize("rounds", [-1.0, 0.5, np.nan, np.inf, 2.0**53, np.ones(1)])
def test_init_refuses_a_memory_without_a_number_of_rounds(rounds):
    with pytest.raises(MergeError, match='memory "rounds": expected a whole number'):
        DARE().init(ParamSpec.of({"a": np.zeros(1, "f4")}), memory={"rounds": np.asarray(rounds)})


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("drop", -0.1),
        ("drop", 1),
        ("drop", np.nan),
        ("then", "median"),
        ("then", None),
        ("density", 0),
        ("scaling", -1),
    ],
)
def test_a_setting_outside_its_range_is_refused(setting, value):
    with pytest.raises(MergeError, match=f"{setting}: expected"):
        DARE(**{setting: value})
