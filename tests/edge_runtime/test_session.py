# SPDX-License-Identifier: Apache-2.0
"""Graphs whose frozen weights have moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from edge_runtime.errors import TrainingError
from edge_runtime.session import MovableGraph, same
from edge_runtime.trainer import OnnxTrainer


def test_a_weight_that_moved_by_a_product_is_a_pair_with_that_product(
    make_bundle: Callable[..., Any],
) -> None:
    made = make_bundle("lora")
    trainer, data, start = OnnxTrainer(made.bundle, threads=1), made.data(9), made.start()
    rng = np.random.default_rng(0)
    ups = {
        pair.up: 0.3 * rng.standard_normal(start[pair.up].shape).astype("f4")
        for pair in made.bundle.manifest.pairs
    }
    offset = {
        pair.base: np.float32(pair.scale) * (ups[pair.up] @ start[pair.down])
        for pair in made.bundle.manifest.pairs
    }
    by_pairs = trainer.evaluate_samples(
        {name: value + ups.get(name, np.float32(0)) for name, value in start.items()}, data
    )
    by_offset = trainer.evaluate_samples(start, data, offset=offset)
    np.testing.assert_allclose(by_offset[0], by_pairs[0], rtol=0, atol=1e-5)
    plain = trainer.evaluate_samples(start, data)
    assert np.abs(plain[0] - by_offset[0]).max() > 1e-2


def test_a_session_is_kept_while_weights_stay(make_bundle: Callable[..., Any]) -> None:
    made = make_bundle("lora")
    graph = MovableGraph(made.bundle.path("evaluate"), threads=1)
    base = made.bundle.manifest.pairs[0].base
    weight = load_file(made.bundle.folder / "backbone.safetensors")[base]
    first = graph.at({})
    assert graph.at({}) is first
    there = graph.at({base: np.ones_like(weight)})
    assert there is not first
    assert graph.at({base: np.ones_like(weight)}) is there, "equal values are the same place"
    assert graph.at({base: 2 * np.ones_like(weight)}) is not there


@pytest.mark.parametrize(
    ("offset", "words"),
    [
        ({"nothing.weight": np.zeros((2, 2), "f4")}, "backbone.safetensors does not have them"),
        ("shape", r"expected float32 \[.*\], found float32 \[1, 1\]"),
        ("dtype", "found float64"),
    ],
)
def test_an_offset_of_something_else_is_refused(
    make_bundle: Callable[..., Any], offset: Any, words: str
) -> None:
    made = make_bundle("lora")
    base = made.bundle.manifest.pairs[0].base
    weight = load_file(made.bundle.folder / "backbone.safetensors")[base]
    if offset == "shape":
        offset = {base: np.zeros((1, 1), "f4")}
    elif offset == "dtype":
        offset = {base: weight.astype("f8")}
    with pytest.raises(TrainingError, match=words):
        MovableGraph(made.bundle.path("evaluate"), threads=1).at(offset)


def test_same_looks_at_names_and_values() -> None:
    one = {"a": np.ones(2), "b": np.zeros(1)}
    assert same(one, {name: value.copy() for name, value in one.items()})
    assert not same(one, {"a": one["a"]})
    assert not same(one, {**one, "a": 2 * one["a"]})
