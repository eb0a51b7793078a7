# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from aggregation.errors import MergeError
from aggregation.robust.foolsgold import FoolsGold, foolsgold_weights
from protocol import ParamSpec

SPEC = ParamSpec.of({"a": np.zeros(6, "f4")})
ROWS = npst.arrays(
    np.float32, st.tuples(st.integers(1, 7), st.just(6)), elements=st.floats(-10, 10, width=32)
)


def merged(updates, memory=None):
    """Of updates by client name."""
    merger = FoolsGold()
    state = merger.init(SPEC, memory=memory or {})
    for client, row in updates.items():
        state = merger.add(state, {"a": np.asarray(row, "f4")}, 1.0, client=client)
    return merger.finish(state)


def slow_weights(histories: list[list[float]]) -> list[float]:
    """The source, value by value, with its divisions by zero given a meaning."""
    n = len(histories)

    def cosine(a, b):
        scale = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
        return sum(x * y for x, y in zip(a, b, strict=True)) / scale if scale > 0 else 0.0

    cs = [
        [0.0 if i == j else cosine(histories[i], histories[j]) for j in range(n)] for i in range(n)
    ]
    v = [max(row) for row in cs]
    for i in range(n):
        for j in range(n):
            if i != j and v[i] < v[j]:
                cs[i][j] *= v[i] / v[j]
    w = [min(1.0, max(0.0, 1 - max(row))) for row in cs]
    w = [value if value > 1e-12 else 0.0 for value in w]
    if max(w) == 0:
        return [1.0] * n
    w = [value / max(w) for value in w]
    w = [0.99 if value == 1 else value for value in w]
    return [
        min(1.0, max(0.0, math.log(value / (1 - value)) + 0.5)) if value > 0 else 0.0 for value in w
    ]


@given(ROWS)
def test_weights_and_mean_are_those_of_the_slow_oracle(rows):
    # squares of less than 1e-20 are of no use to either
    rows = np.round(rows, 2)
    updates = {f"c{number}": row for number, row in enumerate(rows)}
    slow = slow_weights(rows.tolist())
    expected = sum(w * row.astype("f8") for w, row in zip(slow, rows, strict=True)) / sum(slow)
    near_twins = any(0 < 1 - abs(c) < 1e-6 for c in cosines_of(rows).flat)
    if not near_twins:  # there rounding decides, and is enlarged without bound
        np.testing.assert_allclose(merged(updates).delta["a"], expected, rtol=1e-4, atol=1e-4)


def cosines_of(rows) -> np.ndarray:
    wide = rows.astype("f8")
    norms = np.linalg.norm(wide, axis=1)
    scale = np.where(norms > 0, norms, 1)
    return (wide / scale[:, None]) @ (wide / scale[:, None]).T


@given(st.integers(0, 10_000))
def test_weights_of_clients_that_are_somewhat_alike_are_those_of_the_slow_oracle(seed):
    rows = np.abs(np.random.default_rng(seed).normal(size=(5, 4)))
    cosines = cosines_of(rows)
    np.fill_diagonal(cosines, 0)
    np.testing.assert_allclose(
        foolsgold_weights(cosines), slow_weights(rows.tolist()), rtol=1e-6, atol=1e-9
    )


def test_an_honest_client_somewhat_like_a_sybil_is_pardoned():
    cosines = np.array([[0, 0.6, 0.6, 0], [0.6, 0, 0.95, 0], [0.6, 0.95, 0, 0], [0, 0, 0, 0]])
    # 1 - 0.6 · 0.6 / 0.95, where without pardon it were 0.4
    share = 1 - 0.36 / 0.95
    expected = [math.log(share / (1 - share)) + 0.5, 0, 0, 1]
    np.testing.assert_allclose(foolsgold_weights(cosines), expected, atol=1e-12)


def test_weights_lie_from_0_to_1_and_the_largest_is_1():
    rng = np.random.default_rng(0)
    for _ in range(50):
        cosines = cosines_of(rng.normal(size=(6, 4)))
        np.fill_diagonal(cosines, 0)
        before = cosines.copy()
        weights = foolsgold_weights(cosines)
        assert ((weights >= 0) & (weights <= 1)).all() and weights.max() == 1
        np.testing.assert_array_equal(cosines, before)


def test_sybils_count_for_nothing_and_honest_clients_alike():
    rng = np.random.default_rng(1)
    honest = {f"h{number}": row for number, row in enumerate(np.eye(6)[:4])}
    attack = np.array([0, 0, 0, 0, 1e6, 1e6])
    sybils = {f"s{number}": attack * (1 + 1e-4 * rng.normal(size=6)) for number in range(20)}
    found = merged(honest | sybils).delta["a"]
    np.testing.assert_allclose(found, [0.25] * 4 + [0] * 2, atol=1e-5)
    assert np.mean([*honest.values(), *sybils.values()], axis=0)[4] > 1e5


def test_histories_tell_what_one_round_does_not():
    memory = {}
    rng = np.random.default_rng(2)
    for _ in range(30):
        # in each round the sybils' noise hides that they push the same way
        updates = {"h0": [1, 0, 0, 0, 0, 0], "h1": [0, 1, 0, 0, 0, 0]}
        updates |= {f"s{k}": [0, 0, *(0.5 + rng.normal(size=4))] for k in range(3)}
        result = merged(updates, memory)
        memory = dict(result.memory)
    alone = merged(updates).delta["a"]
    assert np.abs(result.delta["a"][2:]).max() < 1e-6
    assert np.abs(alone[2:]).max() > 0.1


def test_the_memory_holds_the_sum_of_each_clients_updates_also_of_absent_ones():
    first = merged({"x": np.ones(6), "y": np.eye(6)[0]})
    second = merged({"x": np.full(6, 2.0), "z": np.eye(6)[1]}, first.memory)
    memory = second.memory
    assert sorted(memory) == ["history/x", "history/y", "history/z"]
    np.testing.assert_array_equal(memory["history/x"], np.full(6, 3, "f4"))
    np.testing.assert_array_equal(memory["history/y"], np.eye(6, dtype="f4")[0])
    assert first.memory["history/x"].tolist() == [1] * 6


def test_twins_that_are_all_there_is_count_alike():
    found = merged({name: np.arange(6) / 7 for name in "abc"}).delta["a"]
    np.testing.assert_allclose(found, np.arange(6) / 7, rtol=1e-6)
    # rounding must not choose between them
    cosines = np.zeros((4, 4))
    cosines[0, 1] = cosines[1, 0] = 1 - 1e-15
    cosines[2, 3] = cosines[3, 2] = 1 - 5e-15
    assert foolsgold_weights(cosines).tolist() == [1, 1, 1, 1]
    pairs = {"a": np.eye(6)[0], "b": np.eye(6)[0], "c": np.eye(6)[1], "d": np.eye(6)[1]}
    np.testing.assert_allclose(merged(pairs).delta["a"], [0.5, 0.5, 0, 0, 0, 0], atol=1e-6)


def test_a_client_that_stands_out_is_all_that_counts_among_twins():
    updates = {"a": np.eye(6)[0], "b": np.eye(6)[0], "c": np.eye(6)[1]}
    np.testing.assert_array_equal(merged(updates).delta["a"], np.eye(6)[1])


def test_updates_of_zeros_are_like_no_other():
    updates = {"a": np.zeros(6), "b": np.zeros(6), "c": np.eye(6)[0] * 3}
    np.testing.assert_allclose(merged(updates).delta["a"], np.eye(6)[0], rtol=1e-6)


def test_one_client_and_opposite_clients_count_fully():
    np.testing.assert_array_equal(merged({"a": np.ones(6)}).delta["a"], np.ones(6))
    found = merged({"a": np.ones(6), "b": np.full(6, -3.0)}).delta["a"]
    np.testing.assert_allclose(found, np.full(6, -1.0), rtol=1e-6)


def test_add_refuses_clients_without_a_name_and_those_that_come_twice():
    merger = FoolsGold()
    update = {"a": np.ones(6, "f4")}
    with pytest.raises(MergeError, match="expected the client's name"):
        merger.add(merger.init(SPEC), update, 1.0)
    state = merger.add(merger.init(SPEC), update, 1.0, client="x")
    with pytest.raises(MergeError, match="one update of client 'x', found two"):
        merger.add(state, update, 1.0, client="x")


def test_add_refuses_when_the_sum_over_the_rounds_is_beyond_float32():
    huge = {"a": np.full(6, 3e38, "f4")}
    memory = {"history/x": np.full(6, 3e38, "f4")}
    merger = FoolsGold()
    with pytest.raises(MergeError, match="client 'x': expected updates whose sum"):
        merger.add(merger.init(SPEC, memory=memory), huge, 1.0, client="x")
    merger.add(merger.init(SPEC, memory=memory), huge, 1.0, client="y")


@pytest.mark.parametrize("history", [np.zeros(5), np.zeros((2, 3)), np.full(6, np.inf)])
def test_init_refuses_a_memory_of_other_tensors(history):
    with pytest.raises(MergeError, match='memory "history/x": expected 6 finite values'):
        FoolsGold().init(SPEC, memory={"history/x": history})
