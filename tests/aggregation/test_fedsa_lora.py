# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from aggregation.errors import MergeError
from aggregation.mergers.fedsa_lora import FedSALoRA
from protocol import ParamSpec
from protocol.factors import FactorPair

PAIRS = (FactorPair(down="a", up="b", scale=2.0),)
SPEC = ParamSpec.of(
    {"a": np.zeros((2, 3), "f4"), "b": np.zeros((4, 2), "f4"), "head": np.zeros(5, "f4")}
)
ELEMENTS = st.floats(-100, 100, width=32)


def update_of(down, fill: float = 1.0) -> dict[str, np.ndarray]:
    return {"a": down, "b": np.full((4, 2), fill, "f4"), "head": np.full(5, fill, "f4")}


def merged(merger, updates):
    state = merger.init(SPEC)
    for update, weight in updates:
        state = merger.add(state, update, weight)
    return merger.finish(state).delta


@given(
    st.lists(
        st.tuples(npst.arrays(np.float32, (2, 3), elements=ELEMENTS), st.integers(1, 1000)),
        min_size=1,
        max_size=5,
    )
)
def test_a_is_the_mean_of_exact_arithmetic_and_what_is_local_does_not_change(updates):
    delta = merged(
        FedSALoRA(pairs=PAIRS, local=("head",)), [(update_of(down), w) for down, w in updates]
    )
    assert SPEC.mismatch(delta) is None
    assert not delta["b"].any()
    assert not delta["head"].any()
    total = sum(weight for _, weight in updates)
    for i in range(6):
        exact = sum(Fraction(float(down.flat[i])) * w for down, w in updates) / total
        assert abs(float(delta["a"].flat[i]) - float(exact)) <= 1e-5


def test_a_classifier_is_averaged_unless_it_is_named_as_local():
    updates = [(update_of(np.zeros((2, 3), "f4"), fill), 1) for fill in (1.0, 3.0)]
    assert merged(FedSALoRA(pairs=PAIRS), updates)["head"].tolist() == [2.0] * 5
    assert merged(FedSALoRA(pairs=PAIRS, local=("head",)), updates)["head"].tolist() == [0.0] * 5


def test_values_of_what_is_local_are_not_read():
    down = np.ones((2, 3), "f4")
    delta = merged(FedSALoRA(pairs=PAIRS, local=("head",)), [(update_of(down, np.nan), 1)])
    np.testing.assert_array_equal(delta["a"], down)
    with pytest.raises(MergeError, match='tensor "head"'):
        merged(FedSALoRA(pairs=PAIRS), [(update_of(down, np.nan), 1)])


def test_kept_names_what_stays_with_the_client():
    assert FedSALoRA(pairs=PAIRS, local=("head",)).kept() == ("b", "head")


def test_local_names_that_are_unknown_or_given_twice_are_refused():
    with pytest.raises(MergeError, match='local: tensor "none" is not in the spec'):
        FedSALoRA(pairs=PAIRS, local=("none",)).init(SPEC)
    for name in ("a", "b"):
        with pytest.raises(MergeError, match=f'found "{name}" twice'):
            FedSALoRA(pairs=PAIRS, local=(name,))


def test_init_refuses_integers_that_stay_with_the_client():
    spec = ParamSpec.of({"a": np.zeros((2, 3), "f4"), "b": np.zeros((4, 2), "i8")})
    with pytest.raises(MergeError, match='"b" is int64'):
        FedSALoRA(pairs=PAIRS).init(spec)
