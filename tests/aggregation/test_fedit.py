# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from aggregation.errors import MergeError
from aggregation.mergers.fedit import FedIT
from protocol import ParamSpec
from protocol.factors import FactorPair

SCALE = 1.5
MERGER = FedIT(pairs=(FactorPair(down="a", up="b", scale=SCALE),))
ELEMENTS = st.floats(-100, 100, width=32)
UPDATES = st.lists(
    st.tuples(
        npst.arrays(np.float32, (2, 3), elements=ELEMENTS),
        npst.arrays(np.float32, (4, 2), elements=ELEMENTS),
        st.integers(1, 1000),
    ),
    min_size=1,
    max_size=5,
)


def merged(updates) -> dict[str, np.ndarray]:
    state = MERGER.init(ParamSpec.of({"a": np.zeros((2, 3), "f4"), "b": np.zeros((4, 2), "f4")}))
    for down, up, weight in updates:
        state = MERGER.add(state, {"a": down, "b": up}, weight)
    return dict(MERGER.finish(state).delta)


@given(UPDATES)
def test_each_factor_is_the_mean_of_exact_arithmetic(updates):
    found = merged(updates)
    total = sum(weight for *_, weight in updates)
    for name, index in (("a", 0), ("b", 1)):
        for i in range(found[name].size):
            exact = sum(Fraction(float(u[index].flat[i])) * u[2] for u in updates) / total
            assert abs(float(found[name].flat[i]) - float(exact)) <= 1e-5


@given(UPDATES)
def test_what_is_missed_is_the_mean_product_of_the_deviations(updates):
    # Σ pᵢ Bᵢ Aᵢ - B̄ Ā = Σ pᵢ (Bᵢ - B̄)(Aᵢ - Ā), all in dense float64
    total = sum(weight for *_, weight in updates)
    parts = [(down.astype("f8"), up.astype("f8"), w / total) for down, up, w in updates]
    mean_down, mean_up = sum(p * a for a, _, p in parts), sum(p * b for _, b, p in parts)
    wanted = SCALE * sum(p * (b - mean_up) @ (a - mean_down) for a, b, p in parts)
    found = merged(updates)
    product = SCALE * found["b"].astype("f8") @ found["a"]
    exact = SCALE * sum(p * b @ a for a, b, p in parts)
    np.testing.assert_allclose(exact - product, wanted, atol=0.02)  # of values up to 30,000


def test_nothing_is_missed_when_clients_agree_on_a_factor():
    rng = np.random.default_rng(0)
    down = rng.standard_normal((2, 3)).astype("f4")
    ups = [rng.standard_normal((4, 2)).astype("f4") for _ in range(3)]
    found = merged([(down, up, weight) for weight, up in enumerate(ups, start=1)])
    wanted = sum(weight * up.astype("f8") @ down for weight, up in enumerate(ups, start=1)) / 6
    np.testing.assert_allclose(found["b"].astype("f8") @ found["a"], wanted, atol=1e-6)


def test_current_tensors_are_not_needed_but_pairs_have_to_fit():
    with pytest.raises(MergeError, match='"b" is not in the spec'):
        MERGER.init(ParamSpec.of({"a": np.zeros((2, 3), "f4")}))
