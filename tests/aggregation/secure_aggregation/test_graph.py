# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
from fractions import Fraction
from itertools import combinations
from math import comb
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.errors import SecureSumError
from aggregation.secure_aggregation.graph import (
    FAILURE,
    LEAK,
    most_marked,
    neighbours,
    neighbours_of,
    ring,
    shape,
    tail,
)

NAMES = tuple(f"device-{number:03d}" for number in range(60))
SEED = bytes(range(32))
SHARES = [(0.0, 0.33), (0.1, 0.33), (0.05, 0.1), (0.1, 0.1), (0.1, 0.0)]


def counted(population: int, marked: int, drawn: int, most: int) -> Fraction:
    """By looking at every draw."""
    draws = list(combinations(range(population), drawn))
    return Fraction(sum(sum(i < marked for i in draw) > most for draw in draws), len(draws))


def literal_tail(population: int, marked: int, drawn: int, most: int) -> Fraction:
    """The textbook's sum."""
    terms = (
        comb(marked, i) * comb(population - marked, drawn - i) for i in range(most + 1, drawn + 1)
    )
    return Fraction(sum(terms), comb(population, drawn))


def connected(members: set[int], edges: tuple[tuple[int, ...], ...]) -> bool:
    seen, open_ = set(), [min(members)]
    while open_:
        place = open_.pop()
        if place not in seen:
            seen.add(place)
            open_ += [other for other in edges[place] if other in members]
    return seen == members


@pytest.mark.parametrize("population", [5, 9])
def test_tails_are_those_of_all_draws(population):
    for marked in range(population + 1):
        for drawn in range(1, population + 1):
            for most in range(drawn + 1):
                expected = counted(population, marked, drawn, most)
                assert tail(population, marked, drawn, most) == expected
                assert literal_tail(population, marked, drawn, most) == expected


@given(st.integers(2, 300), st.data())
def test_tails_are_the_textbook_s_and_most_marked_is_their_inverse(population, data):
    marked = data.draw(st.integers(0, population))
    drawn = data.draw(st.integers(1, population))
    most = data.draw(st.integers(0, drawn))
    assert tail(population, marked, drawn, most) == literal_tail(population, marked, drawn, most)
    chance = Fraction(1, 2 ** data.draw(st.integers(1, 60)))
    allowed = most_marked(population, marked, drawn, chance)
    assert literal_tail(population, marked, drawn, allowed) <= chance
    assert allowed == 0 or literal_tail(population, marked, drawn, allowed - 1) > chance


@pytest.mark.parametrize(("corrupt", "dropouts"), SHARES)
@pytest.mark.parametrize("clients", [3, 5, 10, 20, 21, 40, 100, 200])
def test_shapes_keep_the_stated_bounds(clients, corrupt, dropouts):
    found = shape(clients, corrupt=corrupt, dropouts=dropouts)
    bad, lost = int(corrupt * clients + 1e-9), int(dropouts * clients + 1e-9)
    degree, threshold = found.degree, found.threshold
    assert 2 * threshold > degree + 2 * found.corrupt
    assert degree == clients - 1 or (clients > 20 and degree % 2 == 0)
    leak = clients * literal_tail(clients - 1, bad, degree, found.corrupt)
    failure = clients * literal_tail(clients - 1, lost, degree, degree - threshold)
    assert leak <= LEAK and failure <= FAILURE
    if degree == clients - 1:
        assert leak == failure == 0
    elif degree > 2:
        smaller = degree - 2
        allowed = next(
            c for c in range(smaller + 1)
            if clients * literal_tail(clients - 1, bad, smaller, c) <= LEAK
        )  # fmt: skip
        spare = smaller - (smaller // 2 + allowed + 1)
        assert spare < 0 or clients * literal_tail(clients - 1, lost, smaller, spare) > FAILURE


def test_bounds_hold_on_a_ring_that_is_looked_at_whole():
    """Every set of corrupt clients and every set of dropouts; the bound is a union over clients."""
    count, bad, lost, degree, allowed, spare = 10, 3, 3, 4, 2, 1
    edges = neighbours(NAMES[:count], SEED, degree)
    sets = list(combinations(range(count), bad))
    leaks = sum(any(len(set(e) & set(s)) > allowed for e in edges) for s in sets)
    fails = sum(any(len(set(e) & set(s)) > spare for e in edges) for s in sets)
    bound = count * tail(count - 1, bad, degree, allowed)
    assert 0 < Fraction(leaks, len(sets)) <= bound < 1
    assert Fraction(fails, len(sets)) <= count * tail(count - 1, lost, degree, spare)


@pytest.mark.parametrize(("count", "degree"), [(9, 4), (11, 6), (12, 6)])
def test_survivors_with_enough_neighbours_hang_together(count, degree):
    """No corrupt client: every list on which each has t neighbours is one piece."""
    edges = neighbours(NAMES[:count], SEED, degree)
    threshold = degree // 2 + 1
    accepted = split = 0
    for bits in range(1, 1 << count):
        members = {place for place in range(count) if bits >> place & 1}
        if all(len(members & set(edges[place])) >= threshold for place in members):
            accepted += 1
            assert connected(members, edges)
        split += not connected(members, edges)
    assert accepted > 1 and split > 1


def test_honest_survivors_hang_together_with_corrupt_ones_among_them():
    """One corrupt neighbour each at most; the corrupt one counts for whoever asks."""
    count, degree = 12, 6
    edges = neighbours(NAMES[:count], SEED, degree)
    threshold = degree // 2 + 1 + 1
    for corrupt in range(count):
        others = [place for place in range(count) if place != corrupt]
        for bits in range(1, 1 << len(others)):
            honest = {place for at, place in enumerate(others) if bits >> at & 1}
            kept = honest | {corrupt}
            if all(len(kept & set(edges[place])) >= threshold for place in honest):
                assert connected(honest, edges)


@given(
    st.integers(21, 400), st.sampled_from([0.0, 0.02, 0.05, 0.1]), st.sampled_from([0.05, 0.1, 0.2])
)  # fmt: skip
def test_asking_more_never_needs_fewer_neighbours(clients, corrupt, dropouts):
    base = shape(clients, corrupt=corrupt, dropouts=dropouts)
    assert shape(clients, corrupt=corrupt + 0.03, dropouts=dropouts).degree >= base.degree
    assert shape(clients, corrupt=corrupt, dropouts=dropouts + 0.05).degree >= base.degree
    stricter = shape(clients, corrupt=corrupt, dropouts=dropouts, leak=LEAK / 2**20)
    assert stricter.degree >= base.degree
    surer = shape(clients, corrupt=corrupt, dropouts=dropouts, failure=FAILURE / 2**20)
    assert surer.degree >= base.degree


def test_the_ring_is_much_sparser_than_all_pairs_when_clients_are_many():
    assert shape(1000, corrupt=0.05, dropouts=0.1).degree < 160
    assert shape(20, corrupt=0.05, dropouts=0.1).degree == 19
    assert shape(100, corrupt=0.05, dropouts=0.1, ring_above=100).degree == 99


@pytest.mark.parametrize(
    ("clients", "corrupt", "dropouts", "words"),
    [
        (2, 0.0, 0.0, "expected 3 to"),
        (1 << 17, 0.0, 0.0, "expected 3 to"),
        (20, 1.0, 0.0, "corrupt: expected a share"),
        (20, 0.0, -0.1, "dropouts: expected a share"),
        (20, 0.0, 0.5, "with up to 10 lost only 9 neighbours answer"),
        (20, 0.3, 0.33, "with up to 6 corrupt"),
        (3, 0.0, 0.34, "allow for fewer dropouts"),
        (100, 0.2, 0.33, "secure sum of 100 clients"),
    ],
)
def test_bounds_that_no_graph_keeps_are_refused(clients, corrupt, dropouts, words):
    with pytest.raises(SecureSumError, match=words):
        shape(clients, corrupt=corrupt, dropouts=dropouts)


@given(st.integers(4, 60), st.binary(min_size=32, max_size=32), st.data())
def test_neighbours_are_symmetric_and_as_many_as_said(count, seed, data):
    degree = data.draw(
        st.just(count - 1) | st.integers(1, (count - 2) // 2).map(lambda half: 2 * half)
    )
    edges = neighbours(NAMES[:count], seed, degree)
    for place, others in enumerate(edges):
        assert len(set(others)) == len(others) == degree and place not in others
        assert list(others) == sorted(others)
        assert all(place in edges[other] for other in others)
        assert neighbours_of(place, NAMES[:count], seed, degree) == others


def test_the_ring_follows_from_seed_and_names_alone():
    order = ring(NAMES, SEED)
    assert sorted(order) == list(range(60)) and order != sorted(order)
    assert ring(NAMES, bytes(32)) != order
    # a client that joins moves nobody else
    assert [place for place in ring(NAMES[:-1], SEED)] == [p for p in order if p != 59]
    edges = neighbours(NAMES, SEED, 4)
    at = order.index(7)
    assert set(edges[7]) == {order[(at + step) % 60] for step in (-2, -1, 1, 2)}


@pytest.mark.parametrize("degree", [0, 3, 10, 59 + 2])
def test_degrees_that_no_ring_has_are_refused(degree):
    with pytest.raises(SecureSumError, match="degree: expected 9"):
        neighbours(NAMES[:10], SEED, degree)


def test_the_page_has_the_shapes_that_the_code_gives():
    page = (Path(__file__).parents[3] / "docs" / "secure-aggregation.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", page, flags=re.MULTILINE)
    counts = [int(clients) for clients, _ in rows if int(clients) > 4]
    assert counts == [5, 20, 40, 100, 1000]
    for clients, cells in rows:
        if int(clients) > 4:
            found = [
                shape(int(clients), corrupt=corrupt, dropouts=dropouts)
                for corrupt, dropouts in ((0.1, 0.33), (0.05, 0.1), (0.0, 0.33))
            ]
            assert cells == " | ".join(f"{each.degree}, {each.threshold}" for each in found)
