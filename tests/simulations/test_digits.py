# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits

from simulations.datasets.digits import load_digits_dataset


def test_digits_hold_a_stratified_quarter_for_test() -> None:
    digits = load_digits_dataset()
    assert len(digits.train["labels"]) + len(digits.test["labels"]) == 1797
    assert abs(len(digits.test["labels"]) - 1797 / 4) <= 5
    assert digits.train["images"].shape[1:] == (8, 8)
    for label in range(10):
        held = (digits.test["labels"] == label).sum()
        whole = held + (digits.train["labels"] == label).sum()
        assert abs(held - whole / 4) <= 1


def test_digits_are_scaled_to_the_whole_grey_range() -> None:
    digits = load_digits_dataset()
    together = np.concatenate([digits.train["images"], digits.test["images"]])
    raw = load_digits().images
    assert together.dtype == np.uint8
    assert together.min() == 0 and together.max() == 255
    assert set(np.unique(together)) == {round(level * 255 / 16) for level in range(17)}
    assert abs(together.mean() - raw.mean() * 255 / 16) < 0.5


def test_digits_are_the_same_on_every_load() -> None:
    first, second = load_digits_dataset(), load_digits_dataset()
    assert first.test["images"].tobytes() == second.test["images"].tobytes()
