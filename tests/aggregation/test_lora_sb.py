# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from aggregation.errors import MergeError
from aggregation.mergers.lora_sb import CoreTriple, LoRASB
from protocol import ParamSpec

TRIPLE = CoreTriple(core="r", down="a", up="b", scale=0.5)
MERGER = LoRASB(triples=(TRIPLE,))
RNG = np.random.default_rng(0)
DOWN, UP = RNG.standard_normal((2, 5)).astype("f4"), RNG.standard_normal((6, 2)).astype("f4")
CORE = RNG.standard_normal((2, 2)).astype("f4")
UPDATES = st.lists(
    st.tuples(
        npst.arrays(np.float32, (2, 2), elements=st.floats(-10, 10, width=32)),
        st.integers(1, 1000),
    ),
    min_size=1,
    max_size=6,
)


@given(UPDATES, st.booleans())
def test_product_is_the_mean_of_the_products(updates, sent):
    current = {"r": CORE} | ({"a": DOWN, "b": UP} if sent else {})
    still = {name: np.zeros_like(array) for name, array in current.items()}
    state = MERGER.init(ParamSpec.of(current))
    for core, weight in updates:
        state = MERGER.add(state, still | {"r": core}, weight)
    merged = MERGER.finish(state)
    assert ParamSpec.of(current).mismatch(merged.delta) is None
    total = sum(weight for _, weight in updates)
    wanted = sum(
        weight / total * 0.5 * UP.astype("f8") @ (CORE + core.astype("f8")) @ DOWN
        for core, weight in updates
    )
    found = 0.5 * UP.astype("f8") @ (CORE + merged.delta["r"]) @ DOWN
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert merged.base == {}


@pytest.mark.parametrize("name", ["a", "b"])
def test_add_refuses_when_a_frozen_factor_changes(name):
    update = {"r": CORE, "a": np.zeros_like(DOWN), "b": np.zeros_like(UP)}
    state = MERGER.init(ParamSpec.of(update))
    state = MERGER.add(state, update, 1)
    changed = update | {name: update[name] + np.float32(1e-6)}
    with pytest.raises(MergeError, match=f'tensor "{name}": expected no change, .* core alone'):
        MERGER.add(state, changed, 1)
    np.testing.assert_array_equal(MERGER.finish(state).delta["r"], CORE)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({}, '"r" is not in the spec'),
        ({"r": (2, 3)}, r'"r": expected a core \[r, r\], found \[2, 3\]'),
        ({"r": (4,)}, r'"r": expected a core \[r, r\], found \[4\]'),
        ({"r": (2, 2), "a": (3, 5)}, '"a": expected a factor of rank 2'),
        ({"r": (2, 2), "b": (2, 6)}, '"b": expected a factor of rank 2'),
        ({"r": (2, 2), "a": (2,)}, '"a": expected a factor of rank 2'),
    ],
)
def test_init_refuses_what_is_no_core_between_factors(tensors, said):
    spec = ParamSpec.of({name: np.zeros(shape, "f4") for name, shape in tensors.items()})
    with pytest.raises(MergeError, match=said):
        MERGER.init(spec)


def test_layers_that_are_none_or_share_a_tensor_are_refused():
    with pytest.raises(MergeError, match="one layer or more"):
        LoRASB(triples=())
    with pytest.raises(MergeError, match='found "a" twice'):
        CoreTriple(core="r", down="a", up="a")
    with pytest.raises(MergeError, match='found "b" twice'):
        LoRASB(triples=(TRIPLE, CoreTriple(core="r2", down="a2", up="b")))


@pytest.mark.parametrize("scale", [0, -1.0, np.nan, np.inf, "1", True])
def test_a_scale_that_is_not_positive_and_finite_is_refused(scale):
    with pytest.raises(MergeError, match='scale of "r"'):
        CoreTriple(core="r", down="a", up="b", scale=scale)


def test_frozen_names_both_factors():
    assert MERGER.frozen() == ("a", "b")
