# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from aggregation.errors import MergeError
from aggregation.naming import build, form


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


def test_what_the_context_gives_no_text_can_set() -> None:
    context = {"alpha": 2.0, "size": 9}
    sparse = build("codec", KINDS, "sparse:0.1", MergeError, context=context)
    assert sparse == Sparse(density=0.1, alpha=2.0)
    assert build("codec", KINDS, "plain", MergeError, context=context) == Plain()
    with pytest.raises(MergeError, match=r"expected sparse:DENSITY\[,SCALE\]\[,channel\], found"):
        build("codec", KINDS, "sparse:0.1,alpha=3", MergeError, context=context)


def test_the_form_shows_what_is_needed_and_what_is_not() -> None:
    assert form("sparse", Sparse) == "sparse:DENSITY[,SCALE][,ALPHA][,channel]"
    assert form("trim", Trim) == "trim[:COUNT]"
    assert form("plain", Plain) == "plain"
