# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregation.errors import MergeError
from aggregation.mergers.rolora import ROUND, RoLoRA
from protocol import ParamSpec
from protocol.factors import FactorPair

MERGER = RoLoRA(pairs=(FactorPair(down="a", up="b", scale=2.0),))
SHAPES = {"a": (2, 3), "b": (4, 2)}


def zeros() -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, "f4") for name, shape in SHAPES.items()}


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), counts=st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_every_round_is_exact_and_b_and_a_take_turns(seed, counts):
    rng = np.random.default_rng(seed)
    current = {name: rng.standard_normal(shape).astype("f4") for name, shape in SHAPES.items()}
    memory: dict[str, np.ndarray] = {}
    for number, count in enumerate(counts, start=1):
        active = "b" if number % 2 else "a"
        assert MERGER.frozen(memory) == ("a" if number % 2 else "b",)
        updates = [
            (zeros() | {active: rng.standard_normal(SHAPES[active]).astype("f4")}, weight)
            for weight in rng.integers(1, 100, count)
        ]
        state = MERGER.init(ParamSpec.of(current), current=current, memory=memory)
        for update, weight in updates:
            state = MERGER.add(state, update, int(weight))
        merged = MERGER.finish(state)
        total = sum(int(weight) for _, weight in updates)
        wanted = sum(
            weight / total * (current["b"] + u["b"].astype("f8")) @ (current["a"] + u["a"])
            for u, weight in updates
        )
        current = {name: current[name] + merged.delta[name] for name in current}
        np.testing.assert_allclose(current["b"].astype("f8") @ current["a"], wanted, atol=1e-5)
        memory = dict(merged.memory)
        assert memory[ROUND].dtype == np.int64
        assert memory[ROUND].shape == ()
        assert memory[ROUND] == number


@pytest.mark.parametrize(
    ("finished", "frozen", "said"),
    [
        (0, "a", "B alone in round 1"),
        (1, "b", "A alone in round 2"),
        (2, "a", "B alone in round 3"),
    ],
)
def test_add_refuses_when_the_other_factor_changes_and_the_old_state_stands(finished, frozen, said):
    memory = {ROUND: np.array(finished)} if finished else {}
    state = MERGER.add(MERGER.init(ParamSpec.of(zeros()), memory=memory), zeros(), 1)
    bad = zeros()
    bad[frozen][0, 0] = 1e-30
    with pytest.raises(MergeError, match=f'tensor "{frozen}": expected no change, .*{said}'):
        MERGER.add(state, bad, 1)
    merged = MERGER.finish(state)
    assert not any(delta.any() for delta in merged.delta.values())
    assert merged.memory[ROUND] == finished + 1


def test_a_round_that_failed_is_repeated():
    state = MERGER.init(ParamSpec.of(zeros()), memory={ROUND: np.array(3)})
    with pytest.raises(MergeError, match="nothing was added"):
        MERGER.finish(state)
    assert MERGER.frozen({ROUND: np.array(3)}) == ("b",)


@pytest.mark.parametrize("kept_as", ["f4", "f8", "i8", "u1"])
def test_memory_may_come_back_in_another_type(kept_as):
    assert MERGER.frozen({ROUND: np.array(5, kept_as)}) == ("b",)


@pytest.mark.parametrize(
    "memory",
    [
        {"other": np.array(1)},
        {ROUND: np.array([1])},
        {ROUND: np.array(-1)},
        {ROUND: np.array(1.5)},
        {ROUND: np.array(np.nan)},
        {ROUND: np.array(np.inf)},
    ],
)
def test_init_refuses_a_memory_that_no_round_left(memory):
    with pytest.raises(MergeError, match='memory: expected "round", a whole number'):
        MERGER.init(ParamSpec.of(zeros()), memory=memory)
