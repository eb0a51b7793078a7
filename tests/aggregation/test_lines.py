# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.errors import MergeError
from aggregation.mergers.lines import LiNeS, layer_of
from aggregation.mergers.weighted_mean import WeightedMean
from protocol import ParamSpec

NAMES = (
    "head.weight",
    "vit.layers.0.attention.q.lora_A",
    "vit.layers.1.mlp.2.bias",
    "vit.layers.4.norm",
)


def merged(merger, names, updates, weights) -> dict[str, np.ndarray]:
    state = merger.init(ParamSpec.of(dict.fromkeys(names, np.zeros(2, "f4"))))
    for update, weight in zip(updates, weights, strict=True):
        tensors = {name: update[i] for i, name in enumerate(names)}
        state = merger.add(state, tensors, weight)
    return dict(merger.finish(state).delta)


@given(st.floats(0, 3), st.floats(0, 3), st.integers(0, 100))
def test_each_layer_is_scaled_by_the_formula(first, last, seed):
    rng = np.random.default_rng(seed)
    updates = rng.normal(size=(3, 4, 2)).astype("f4")
    weights = rng.integers(1, 50, 3).tolist()
    found = merged(LiNeS(first=first, last=last), NAMES, updates, weights)
    mean = merged(WeightedMean(), NAMES, updates, weights)
    a, b, layers = first, last - first, 5
    scales = {"head": a, "0": a, "1": a + b * 1 / (layers - 1), "4": a + b * 4 / (layers - 1)}
    for name in NAMES:
        key = name.split(".")[2] if name.startswith("vit") else "head"
        np.testing.assert_allclose(found[name], scales[key] * mean[name], rtol=1e-5, atol=1e-6)


def test_equal_scales_are_the_scaled_mean():
    updates = np.ones((2, 4, 2), "f4")
    found = merged(LiNeS(first=0.25, last=0.25), NAMES, updates, [1, 1])
    assert all((value == 0.25).all() for value in found.values())


@pytest.mark.parametrize("names", [("bias", "head.weight"), ("blocks.0.a", "head.weight")])
def test_without_layers_or_with_one_all_is_scaled_as_the_first(names):
    found = merged(LiNeS(first=0.5, last=2), names, np.ones((1, 2, 2), "f4"), [1])
    assert all((value == 0.5).all() for value in found.values())


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("vit.layers.3.attention.weight", 3),
        ("blocks.11.mlp.2.bias", 11),
        ("7", 7),
        ("layers.007.x", 7),
        ("head.weight", None),
        ("layer3.weight", None),
        ("layers.-1.x", None),
        ("layers.1e3.x", None),
        ("layers.².x", None),
        ("layers.٣.x", None),
        ("", None),
    ],
)
def test_the_layer_is_the_first_integer_between_dots(name, layer):
    assert layer_of(name) == layer


@pytest.mark.parametrize("setting", ["first", "last"])
@pytest.mark.parametrize("value", [-0.1, np.nan, np.inf, "1", None, True])
def test_a_scale_that_is_not_a_finite_number_of_0_or_above_is_refused(setting, value):
    with pytest.raises(MergeError, match=f"{setting}: expected a finite number of 0 or above"):
        LiNeS(**{setting: value})
