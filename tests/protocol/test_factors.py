# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from protocol import SpecError
from protocol.factors import FactorPair, at_rank, check_pairs, chosen, cut, filled
from protocol.tensors import ParamSpec

SPEC = ParamSpec.of(
    {
        "head": np.zeros(3, "f4"),
        "q.A": np.zeros((2, 5), "f4"), "q.B": np.zeros((4, 2), "f4"),
        "v.A": np.zeros((1, 5), "f4"), "v.B": np.zeros((6, 1), "f4"),
    }
)  # fmt: skip
PAIRS = tuple(FactorPair(down=f"{n}.A", up=f"{n}.B", scale=2) for n in "qv")


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("all", ["head", "q.A", "q.B", "v.A", "v.B"]),
        ("up", ["head", "q.B", "v.B"]),
        ("down", ["head", "q.A", "v.A"]),
        ("down-only", ["q.A", "v.A"]),
    ],
)
def test_a_word_means_these_tensors(choice: str, names: list[str]) -> None:
    found = chosen(choice, SPEC, PAIRS)
    assert list(found.names) == names
    assert all(found[name] == SPEC[name] for name in names)


def test_pairs_that_fit_pass() -> None:
    check_pairs(PAIRS, SPEC)
    assert PAIRS[0].scale == 2.0 and isinstance(PAIRS[0].scale, float)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([FactorPair(down="q.A", up="x", scale=1)], '"x" is not in the spec'),
        ([*PAIRS, FactorPair(down="q.A", up="v.B", scale=1)], '"q.A" is in two pairs'),
        ([FactorPair(down="q.B", up="q.A", scale=1)], r"expected shapes \[r, k\] and \[d, r\]"),
        ([FactorPair(down="head", up="q.B", scale=1)], r"found \[3\] and \[4, 2\]"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(pairs: list[FactorPair], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        check_pairs(pairs, SPEC)


@pytest.mark.parametrize(
    ("down", "up", "scale"),
    [("a", "a", 1.0), ("", "b", 1.0), ("a", None, 1.0), ("a", "b", 0), ("a", "b", float("nan")),
     ("a", "b", "1"), ("a", "b", -1.0)],
)  # fmt: skip
def test_pair_is_refused(down: str, up: str, scale: float) -> None:
    with pytest.raises(SpecError):
        FactorPair(down=down, up=up, scale=scale)


def test_a_smaller_rank_has_the_first_rows_and_columns() -> None:
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(e.shape).astype("f4") for name, e in SPEC.entries}
    small = cut(tensors, 1, PAIRS)
    assert at_rank(1, SPEC, PAIRS) == ParamSpec.of(small)
    assert small["head"] is tensors["head"]
    np.testing.assert_array_equal(small["q.A"], tensors["q.A"][:1])
    np.testing.assert_array_equal(small["q.B"], tensors["q.B"][:, :1])
    again = filled(small, SPEC)
    assert SPEC.mismatch(again) is None
    np.testing.assert_array_equal(again["q.B"] @ again["q.A"], small["q.B"] @ small["q.A"])
    assert not again["q.A"][1:].any() and not again["q.B"][:, 1:].any()


def test_rank_0_and_ranks_above_the_spec_s_change_nothing() -> None:
    tensors = {name: np.ones(e.shape, "f4") for name, e in SPEC.entries}
    assert at_rank(0, SPEC, PAIRS) is SPEC and cut(tensors, 0, PAIRS) is tensors
    assert at_rank(9, SPEC, PAIRS) == SPEC == ParamSpec.of(cut(tensors, 9, PAIRS))


@pytest.mark.parametrize("base", [7, "", "x" * 600])
def test_a_base_is_the_name_of_a_weight_or_empty(base: object) -> None:
    if base == "":
        assert FactorPair(down="a", up="b", scale=1.0, base="").base == ""
        return
    with pytest.raises(SpecError, match="pair: base"):
        FactorPair(down="a", up="b", scale=1.0, base=base)  # type: ignore[arg-type]
