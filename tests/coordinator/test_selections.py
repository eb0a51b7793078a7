# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from coordinator.selections import selection_counts, unselected


@pytest.mark.parametrize(
    ("metrics", "elements", "counts"),
    [
        ({"loss": 1.0, "selected/0": 3.0, "selected/1": 0.0}, 2, [3.0, 0.0]),
        ({"selected/0": 3.0}, 2, []),
        ({"selected/0": 3.0, "selected/1": -1.0}, 2, []),
        ({"selected/0": 3.0, "selected/1": 1.0, "selected/2": 9.0}, 2, [3.0, 1.0]),
        ({"loss": 1.0}, 0, []),
        ({"selected/0": 3.0}, 0, []),
    ],
)
def test_counts_are_one_an_element_or_none(
    metrics: dict[str, float], elements: int, counts: list[float]
) -> None:
    assert selection_counts(metrics, elements) == counts


def test_elements_that_nobody_selected_are_named() -> None:
    assert unselected({}) == []
    assert unselected({"ada": [1, 0], "ben": [0, 2]}) == []
    (note,) = unselected({"ada": [1, 0, 0], "ben": [2, 0, 1]})
    assert note.startswith("1 of 3 elements were selected by nobody") and note.endswith(": 1")
    (note,) = unselected({"ada": [1, *[0] * 20]})
    assert note.endswith("8, 9, 10 and others")
