# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.errors import MergeError
from aggregation.mergers import COUNTS, CountedPool
from protocol.tensors import ParamSpec

SPEC = ParamSpec.of({"keys": np.zeros((3, 4), "f4"), "scale": np.zeros((3, 2, 2), "f4")})


def update(seed: int, counts) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    tensors = {n: rng.standard_normal(e.shape).astype("f4") for n, e in SPEC.entries}
    return {**tensors, COUNTS: np.array(counts, "f8")}


def merged(updates, weights) -> dict[str, np.ndarray]:
    merger = CountedPool()
    state = merger.init(SPEC)
    for one, weight in zip(updates, weights, strict=True):
        state = merger.add(state, one, weight)
    return dict(merger.finish(state).delta)


COUNT_ROWS = st.lists(st.integers(0, 5), min_size=3, max_size=3).filter(any)


@given(st.lists(st.tuples(COUNT_ROWS, st.integers(1, 9)), min_size=1, max_size=5))
def test_every_element_is_the_mean_over_those_that_used_it(rows) -> None:
    updates = [update(seed, counts) for seed, (counts, _) in enumerate(rows)]
    found = merged(updates, [weight for _, weight in rows])
    for name, entry in SPEC.entries:
        for j in range(3):
            shares = [weight * counts[j] / sum(counts) for counts, weight in rows]
            expected = np.zeros(entry.shape[1:])
            if sum(shares) > 0:
                parts = [s * u[name][j].astype("f8") for s, u in zip(shares, updates, strict=True)]
                expected = sum(parts) / sum(shares)
            np.testing.assert_allclose(found[name][j], expected, rtol=0, atol=1e-6)
        assert found[name].dtype == np.float32


def test_an_element_of_one_client_keeps_all_of_its_change() -> None:
    lone, other = update(0, [1, 0, 0]), update(1, [0, 4, 0])
    found = merged([lone, other], [1.0, 50.0])
    np.testing.assert_allclose(found["keys"][0], lone["keys"][0], rtol=1e-6)
    np.testing.assert_allclose(found["keys"][1], other["keys"][1], rtol=1e-6)
    assert not found["keys"][2].any()


def test_large_counts_do_not_make_a_client_weigh_more() -> None:
    small, large = update(0, [1, 1, 0]), update(1, [10**9, 10**9, 0])
    found = merged([small, large], [1.0, 1.0])
    np.testing.assert_allclose(
        found["keys"][0], (small["keys"][0] + large["keys"][0]) / 2, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ([1, 2], r"expected 3 counts, one an element, found \[2\]"),
        ([0, 0, 0], "not all 0"),
        ([1, -1, 1], "0 or more"),
        ([1, np.nan, 1], "0 or more"),
        (None, "update.metrics"),
    ],
)
def test_counts_that_cannot_be_used_are_refused(counts, words: str) -> None:
    merger = CountedPool()
    bad = update(0, [1, 1, 1])
    del bad[COUNTS]
    if counts is not None:
        bad[COUNTS] = np.array(counts, "f8")
    with pytest.raises(MergeError, match=words):
        merger.add(merger.init(SPEC), bad, 1.0)


def test_what_is_no_pool_is_refused() -> None:
    with pytest.raises(MergeError, match="one leading axis of elements, found axes of 3, 5"):
        CountedPool().init(ParamSpec.of({"a": np.zeros((3, 2), "f4"), "b": np.zeros(5, "f4")}))
    with pytest.raises(MergeError, match="nothing was added"):
        CountedPool().finish(CountedPool().init(SPEC))


@pytest.mark.parametrize("spoil", ["nan", "shape", "missing", "weight"])
def test_updates_that_do_not_fit_are_refused(spoil: str) -> None:
    merger, bad, weight = CountedPool(), update(0, [1, 1, 1]), 1.0
    if spoil == "nan":
        bad["keys"][0, 0] = np.nan
    elif spoil == "shape":
        bad["keys"] = bad["keys"][:2]
    elif spoil == "missing":
        del bad["keys"]
    else:
        weight = 0.0
    with pytest.raises(MergeError):
        merger.add(merger.init(SPEC), bad, weight)
