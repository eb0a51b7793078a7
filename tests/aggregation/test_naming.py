# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.errors import MergeError
from aggregation.naming import build, form, text_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparse:
    density: float
    scale: str = "std"
    alpha: float = 1.0
    per_channel: bool = False
    evaluate: Callable[[], float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trim:
    count: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Plain:
    pass


KINDS: dict[str, type] = {"sparse": Sparse, "trim": Trim, "plain": Plain}


def made(text: str) -> object:
    return build("codec", KINDS, text, MergeError)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", Plain()),
        ("trim", Trim()),
        ("trim:3", Trim(count=3)),
        ("trim: count = 3", Trim(count=3)),
        ("sparse:0.1", Sparse(density=0.1)),
        ("sparse:1e-3,mean", Sparse(density=0.001, scale="mean")),
        ("sparse:0.1,channel", Sparse(density=0.1, per_channel=True)),
        (
            "sparse:channel,0.1,mean,2",
            Sparse(density=0.1, scale="mean", alpha=2.0, per_channel=True),
        ),
        ("sparse:0.1,alpha=2,per_channel=false", Sparse(density=0.1, alpha=2.0)),
    ],
)
def test_settings_are_taken_in_order_or_by_name(text: str, expected: object) -> None:
    assert made(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("spars:1", r"codec: expected one of sparse:DENSITY\[,SCALE\].*, trim\[:COUNT\], plain, "),
        ("", "found ''"),
        ("sparse", "without density"),
        ("sparse:", "density: expected a number, found ''"),
        ("sparse:much", "density: expected a number, found 'much'"),
        ("sparse:nan", "density: expected a number, found 'nan'"),
        ("trim:2.5", r"count: expected a whole number, found '2\.5'"),
        ("trim:1,2", r"expected trim\[:COUNT\], found 'trim:1,2' \('2' has no place\)"),
        ("trim:1,count=2", "'count=2' has no place"),
        ("trim:size=2", "'size=2' has no place"),
        ("plain:1", "expected plain, found 'plain:1'"),
        ("sparse:0.1,evaluate=x", "'evaluate=x' has no place"),
        ("sparse:0.1,per_channel=yes", "expected true or false, found 'yes'"),
    ],
)
def test_a_text_that_names_nothing_is_refused(text: str, message: str) -> None:
    with pytest.raises(MergeError, match=message):
        made(text)


@given(
    st.floats(1e-6, 1), st.sampled_from(["std", "mean"]), st.sampled_from([1.0, 2.5]), st.booleans()
)
def test_the_canonical_text_makes_the_same_object(
    density: float, scale: str, alpha: float, channel: bool
) -> None:
    sparse = Sparse(
        density=float(format(density, ".12g")), scale=scale, alpha=alpha, per_channel=channel
    )
    assert made(text_of("sparse", sparse)) == sparse


def test_the_form_shows_what_is_needed_and_what_is_not() -> None:
    assert form("sparse", Sparse) == "sparse:DENSITY[,SCALE][,ALPHA][,channel]"
    assert form("trim", Trim) == "trim[:COUNT]"
    assert form("plain", Plain) == "plain"
    assert text_of("trim", Trim()) == "trim"
    assert text_of("trim", Trim(count=5)) == "trim:count=5"
