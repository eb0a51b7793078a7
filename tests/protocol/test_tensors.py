# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from protocol import ParamSpec, SpecError, TensorSpec
from protocol.limits import MAX_NAME_LENGTH, MAX_RANK, MAX_TENSORS

SHAPES = npst.array_shapes(min_dims=0, max_dims=3, max_side=5)
TENSORS = st.dictionaries(
    st.text("abz.Ä_0", min_size=1, max_size=8),
    SHAPES.flatmap(lambda shape: npst.arrays(np.float32, shape)),
    max_size=5,
)


@given(TENSORS)
def test_spec_of_tensors_survives_json_and_fits_them(tensors):
    spec = ParamSpec.of(tensors)
    assert ParamSpec.from_json(spec.to_json()) == spec
    assert spec.mismatch(tensors) is None
    assert spec.names == tuple(sorted(tensors))
    assert spec.size == sum(a.size for a in tensors.values())
    assert spec.nbytes == sum(a.nbytes for a in tensors.values())
    assert all(spec[name].shape == a.shape for name, a in tensors.items())


@given(TENSORS)
def test_flatten_is_concatenation_in_name_order_and_unflatten_its_inverse(tensors):
    spec = ParamSpec.of(tensors)
    before = {name: array.tobytes() for name, array in tensors.items()}
    vector = spec.flatten(tensors)
    slow = [value for name in sorted(tensors) for value in tensors[name].flatten().tolist()]
    np.testing.assert_array_equal(vector, np.array(slow, np.float32))
    again = spec.unflatten(vector)
    assert {name: array.tobytes() for name, array in again.items()} == before
    assert spec.mismatch(again) is None
    for array in again.values():
        array[...] = 7
    assert vector.tobytes() == spec.flatten(tensors).tobytes(), "unflatten gave views of its input"


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, 'tensor "a" is missing, spec says float32 [2, 3]'),
        ({"a": np.zeros((2, 3), "f4"), "b": np.zeros(1)}, "'b' is not in the spec"),
        ({"a": np.zeros((3, 2), "f4")}, "float32 [3, 2], spec says float32 [2, 3]"),
        ({"a": np.zeros((2, 3))}, "float64 [2, 3], spec says float32 [2, 3]"),
        ({"a": [[0.0] * 3] * 2}, "is a list"),
    ],
)
def test_mismatch_names_the_first_disagreement(tensors, words):
    spec = ParamSpec((("a", TensorSpec((2, 3), "float32")),))
    assert words in spec.mismatch(tensors)
    with pytest.raises(SpecError, match="cannot flatten"):
        spec.flatten(tensors)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("a", "expected a list"),
        ([["a", "float32"]], "expected [name, dtype, shape]"),
        ([["a", "float32", [0]]], "expected 1 to"),
        ([["a", "float32", [-1]]], "expected 1 to"),
        ([["a", "float32", [True]]], "expected an integer"),
        ([["a", "float32", [1.0]]], "expected an integer"),
        ([["a", "float32", [1] * (MAX_RANK + 1)]], "at most 8 entries"),
        ([["a", "float32", [2**30, 2**30]]], "values"),
        ([["a", "object", [1]]], "expected one of bool, float16"),
        ([["a", ["float32"], [1]]], "expected one of"),
        ([["", "float32", [1]]], "characters"),
        ([["a" * (MAX_NAME_LENGTH + 1), "float32", [1]]], "characters"),
        ([["a\n", "float32", [1]]], "printable"),
        ([[7, "float32", [1]]], "expected text"),
        ([["b", "float32", [1]], ["a", "float32", [1]]], "sorted by name"),
        ([["a", "float32", [1]], ["a", "float32", [1]]], "given twice"),
        ([["a", "float32", [1]]] * (MAX_TENSORS + 1), "at most 16384"),
    ],
)
def test_from_json_refuses_when_rows_are_wrong(rows, words):
    with pytest.raises(SpecError) as caught:
        ParamSpec.from_json(rows)
    assert words in str(caught.value)


def test_spec_refuses_more_values_than_the_limit_in_total():
    half = TensorSpec((1 << 35,), "float32")
    with pytest.raises(SpecError, match="at most 68719476736 values"):
        ParamSpec((("a", half), ("b", half), ("c", half)))


def test_flat_vectors_are_refused_when_not_all_is_float32():
    spec = ParamSpec.of({"step": np.zeros((), np.int64)})
    with pytest.raises(SpecError, match='"step" is int64'):
        spec.flatten({"step": np.zeros((), np.int64)})
    with pytest.raises(SpecError, match="only float32"):
        spec.unflatten(np.zeros(1, np.float32))


@pytest.mark.parametrize("vector", [np.zeros(5, "f4"), np.zeros(6), np.zeros((6, 1), "f4")])
def test_unflatten_refuses_when_the_vector_does_not_fit(vector):
    with pytest.raises(SpecError, match=r"expected float32 \[6\]"):
        ParamSpec.of({"a": np.zeros((2, 3), "f4")}).unflatten(vector)
