# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from aggregation.errors import MergeError
from aggregation.mergers.ffa_lora import FFALoRA
from protocol import ParamSpec
from protocol.factors import FactorPair

MERGER = FFALoRA(pairs=(FactorPair(down="a", up="b", scale=2.0),))
ELEMENTS = st.floats(-10, 10, width=32)
CURRENT = {
    "a": np.random.default_rng(0).standard_normal((2, 3)).astype("f4"),
    "b": np.random.default_rng(1).standard_normal((4, 2)).astype("f4"),
}


def added(state, up, weight, down=None):
    down = np.zeros((2, 3), "f4") if down is None else down
    return MERGER.add(state, {"a": down, "b": up}, weight)


@given(
    st.lists(
        st.tuples(npst.arrays(np.float32, (4, 2), elements=ELEMENTS), st.integers(1, 1000)),
        min_size=1,
        max_size=6,
    )
)
def test_product_is_the_mean_of_the_products(updates):
    state = MERGER.init(ParamSpec.of(CURRENT))
    for up, weight in updates:
        state = added(state, up, weight)
    delta = MERGER.finish(state).delta
    assert not delta["a"].any()
    total = sum(weight for _, weight in updates)
    wanted = sum(
        weight / total * (CURRENT["b"] + up.astype("f8")) @ CURRENT["a"] for up, weight in updates
    )
    found = (CURRENT["b"] + delta["b"]).astype("f8") @ CURRENT["a"]
    np.testing.assert_allclose(found, wanted, atol=1e-4)  # of values up to 60


@pytest.mark.parametrize("change", [1e-45, -1e-3, 5.0])
def test_add_refuses_when_a_frozen_factor_changes_and_the_old_state_stands(change):
    down = np.zeros((2, 3), "f4")
    down[1, 2] = change
    up = np.ones((4, 2), "f4")
    state = added(MERGER.init(ParamSpec.of(CURRENT)), up, 1)
    with pytest.raises(MergeError, match=r'tensor "a": expected no change, .* trains B alone'):
        added(state, 3 * up, 1, down)
    assert MERGER.finish(state).delta["b"].tolist() == up.tolist()


def test_a_negative_zero_is_no_change():
    state = added(MERGER.init(ParamSpec.of(CURRENT)), CURRENT["b"], 2, np.full((2, 3), -0.0, "f4"))
    np.testing.assert_array_equal(MERGER.finish(state).delta["b"], CURRENT["b"])


def test_frozen_names_every_a():
    pairs = tuple(FactorPair(down=f"{i}.a", up=f"{i}.b", scale=1.0) for i in range(2))
    assert FFALoRA(pairs=pairs).frozen() == ("0.a", "1.a")
