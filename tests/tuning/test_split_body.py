# SPDX-License-Identifier: Apache-2.0
"""The body for several devices at once, on both engines, beside one device after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from coordinator.onnx_body import OnnxBody
from tuning.split_body import TorchBody

Make = Callable[..., Any]
ROWS = (4, 1, 3)


def engines(made: Any) -> dict[str, Any]:
    return {"torch": TorchBody(made.tuned), "onnx": OnnxBody(made.split.server, threads=1)}


def drawn(made: Any, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = made.bundle.manifest.split.entering.shape
    return [rng.standard_normal((rows, *shape), dtype=np.float32) for rows in ROWS]


def masks_of(made: Any) -> list[np.ndarray] | None:
    spec = made.bundle.manifest.split
    if not spec.masked:
        return None
    masks = [np.zeros((rows, *spec.mask.shape), np.float32) for rows in ROWS]
    for place, mask in enumerate(masks):
        mask[..., spec.entering_tokens - place :] = -10_000.0
    return masks


@pytest.mark.parametrize("engine", ["torch", "onnx"])
@pytest.mark.parametrize(("kind", "optimizer"), [("image", "sgd"), ("text", "adamw")])
def test_together_and_apart_are_the_same(
    make_split: Make, engine: str, kind: str, optimizer: str
) -> None:
    made = make_split("1+0", kind=kind, optimizer=optimizer)
    body = engines(made)[engine]
    hidden, gradients, masks = drawn(made, 0), drawn(made, 1), masks_of(made)
    joined = body.forward(hidden, masks, keep=True)
    back = body.backward([(kept, g) for (_, kept), g in zip(joined, gradients, strict=True)])
    for place, states in enumerate(hidden):
        own = None if masks is None else [masks[place]]
        ((left, kept),) = body.forward([states], own, keep=True)
        (entered,) = body.backward([(kept, gradients[place])])
        np.testing.assert_allclose(joined[place][0], left, rtol=0, atol=1e-5)
        np.testing.assert_allclose(back[place], entered, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["image", "text"])
def test_engines_agree(make_split: Make, kind: str) -> None:
    made = make_split("1+0", kind=kind, optimizer="sgd" if kind == "image" else "adamw")
    found = []
    for body in engines(made).values():
        answers = body.forward(drawn(made, 0), masks_of(made), keep=True)
        pairs = [(kept, g) for (_, kept), g in zip(answers, drawn(made, 1), strict=True)]
        found.append(([left for left, _ in answers], body.backward(pairs)))
    for one, other in zip(*found, strict=True):
        for value, expected in zip(one, other, strict=True):
            np.testing.assert_allclose(value, expected, rtol=0, atol=1e-5)


def test_devices_of_one_pass_may_come_back_one_by_one_or_not_at_all(make_split: Make) -> None:
    made = make_split("1+0")
    body = TorchBody(made.tuned)
    hidden, gradients = drawn(made, 0), drawn(made, 1)
    answers = body.forward(hidden, None, keep=True)
    kept = [each for _, each in answers]
    together = body.backward(list(zip(kept, gradients, strict=True)))
    kept = [each for _, each in body.forward(hidden, None, keep=True)]
    for place in (2, 0):  # the one between never comes
        (alone,) = body.backward([(kept[place], gradients[place])])
        np.testing.assert_allclose(alone, together[place], rtol=0, atol=1e-5)


@pytest.mark.parametrize("engine", ["torch", "onnx"])
def test_nothing_is_kept_where_no_one_comes_back(make_split: Make, engine: str) -> None:
    made = make_split("1+0")
    answers = engines(made)[engine].forward(drawn(made, 0), None, keep=False)
    assert [kept for _, kept in answers] == [None] * len(ROWS)
