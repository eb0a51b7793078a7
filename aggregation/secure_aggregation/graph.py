# SPDX-License-Identifier: Apache-2.0
"""Who masks towards whom, and how many shares give a secret back.

Up to 20 clients everybody is everybody's neighbour. Above that the clients stand on a ring, in an
order that follows from a seed which all know, and the k/2 next on either side are a client's
neighbours. A client's secrets are shared among its k neighbours, with the threshold t.

With n clients, of which at most c_n = ⌊γn⌋ are corrupt and help the server, and at most
d_n = ⌊δn⌋ drop out, let H(N, K, k) be the number of marked ones among k drawn without replacement
from N of which K are marked (hypergeometric), and c be the most corrupt neighbours that any client
is allowed for. Then

    leak       n·P[H(n - 1, c_n, k) > c]       at most 2⁻⁴⁰ (σ)
    t          ⌊k/2⌋ + c + 1, hence 2t > k + 2c
    failure    n·P[H(n - 1, d_n, k) > k - t]   at most 2⁻³⁰ (η)

and k is the smallest even degree for which all three hold, with the smallest c of the first. Where
there is none below n - 1 the graph is complete; then c = min(c_n, n - 1), and d_n ≤ k - t without
chance.

What 2t > k + 2c gives, if no client has more than c corrupt neighbours, whatever the server tells
to whom (each honest neighbour gives at most one of a client's two secrets away):

- *Never both.* Two sets of t holders have 2t - k > c in common, so that some honest one would have
  had to give both.
- *Who answers is not opened.* A client accepts a list of survivors only with t of its neighbours'
  signatures under the same list, and each honest neighbour signs one; its own mask key would take
  t neighbours under a list without it.
- *No sum over a part.* Take the honest survivors of a list that they have all signed, each with t
  neighbours on it towards whom it masked, and cut them in two without a mask across. Where the side
  changes along the ring, at neighbours i and j with g - 1 others between them that are on neither
  side: i has at least t - c honest ones of its side around it and j of its own, and their two
  windows together have k + g - 1 other places, of which those g - 1, and the corrupt, are taken:
  2t ≤ k + 2c, a contradiction. A gap of k/2 or more leaves i with at most k/2 + c of its t. A
  survivor that the server did not ask to sign is masked towards one honest signer at the least: t
  holders under the list gave its seed, it masked towards t, and 2t - k > c of them are the same. On
  a complete graph these too are in one piece with the rest, and one list is all that honest clients
  can accept, by the same count.

On a ring a server that shows different lists to clients far apart may get some list that is a
patchwork of them: every survivor still has t surviving neighbours, but how many survive in all is
then bounded by that share only, not by the job's floor.

*Source* Bell, Bonawitz, Gascón, Lepoint, Raykova, "Secure Single-Server Aggregation with
(Poly)Logarithmic Overhead", CCS 2020: the ring and the union bound over hypergeometric tails;
Bonawitz et al., CCS 2017: t of the complete graph.
*Differs from source*: tails are exact, in integers, not bounded by exponentials; the threshold is
high enough that what clients check by themselves keeps the masked graph in one piece, so that no
separate bound on connectedness is needed.

The leak bound is about a seed that was drawn without regard to who is corrupt. A server that itself
colludes with clients and tries 2ᵍ seeds until one suits it multiplies the bound by 2ᵍ; a seed that
it cannot choose, or a complete graph (`ring_above=n`), takes that away.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import comb, floor
from typing import Final

from aggregation.errors import SecureSumError

COMPLETE_UP_TO: Final = 20
MIN_CLIENTS: Final = 3  # of two, each learns the other's vector from the sum
MAX_CLIENTS: Final = 1 << 16
LEAK: Final = Fraction(1, 2**40)
FAILURE: Final = Fraction(1, 2**30)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Degree of the graph and threshold of its secrets; `corrupt` is the c of the module's text."""

    degree: int
    threshold: int
    corrupt: int


@lru_cache(maxsize=64)
def shape(
    clients: int,
    *,
    corrupt: float,
    dropouts: float,
    leak: Fraction = LEAK,
    failure: Fraction = FAILURE,
    ring_above: int = COMPLETE_UP_TO,
) -> Shape:
    """The smallest graph that keeps both bounds for these shares of corrupt and lost clients.

    Raises: SecureSumError where none does, with what would help.
    *Cost* below 0.2 s for up to 1,000 clients; answers are remembered.
    """
    if not MIN_CLIENTS <= clients <= MAX_CLIENTS:
        raise SecureSumError(
            f"clients: expected {MIN_CLIENTS} to {MAX_CLIENTS} in a secure sum, found {clients}"
        )
    for field, share in (("corrupt", corrupt), ("dropouts", dropouts)):
        if not 0 <= share < 1:
            raise SecureSumError(f"{field}: expected a share from 0 to below 1, found {share:g}")
    bad, lost = _count(corrupt, clients), _count(dropouts, clients)
    if clients > ring_above:
        for degree in range(2, clients - 1, 2):
            allowed = most_marked(clients - 1, bad, degree, leak / clients)
            threshold = degree // 2 + allowed + 1
            if threshold > degree:
                continue
            if tail(clients - 1, lost, degree, degree - threshold) * clients <= failure:
                return Shape(degree=degree, threshold=threshold, corrupt=allowed)
    degree = clients - 1
    allowed = min(bad, degree)
    threshold = degree // 2 + allowed + 1
    if threshold > degree - lost:
        raise SecureSumError(
            f"secure sum of {clients} clients: with up to {bad} corrupt a threshold of {threshold} "
            f"is needed, and with up to {lost} lost only {degree - lost} neighbours answer; allow "
            "for fewer dropouts or fewer corrupt clients"
        )
    return Shape(degree=degree, threshold=threshold, corrupt=allowed)


def tail(population: int, marked: int, drawn: int, most: int) -> Fraction:
    """P[H(population, marked, drawn) > most], exactly."""
    above = sum(ways for i, ways in _ways(population, marked, drawn) if i > most)
    return Fraction(above, comb(population, drawn))


def most_marked(population: int, marked: int, drawn: int, chance: Fraction) -> int:
    """The smallest c with P[H(population, marked, drawn) > c] ≤ chance."""
    budget = chance * comb(population, drawn)
    above = 0
    for i, ways in _ways(population, marked, drawn):
        above += ways
        if above > budget:
            return i
    return 0


def _ways(population: int, marked: int, drawn: int) -> Iterator[tuple[int, int]]:
    """How many draws hold i marked ones, from the largest i that there can be down to 0."""
    i, plain = min(marked, drawn), population - marked
    ways = comb(marked, i) * comb(plain, drawn - i)
    while i >= 0 and drawn - i <= plain:
        yield i, ways
        # the next from the last: much less than two binomials each
        ways = ways * i * (plain - drawn + i) // ((marked - i + 1) * (drawn - i + 1)) if i else 0
        i -= 1


def ring(names: Sequence[str], seed: bytes) -> list[int]:
    """Places in `names` in the order of the ring: sorted by SHA-256 of seed and name."""
    keys = [hashlib.sha256(seed + name.encode()).digest() for name in names]
    return sorted(range(len(names)), key=keys.__getitem__)


def neighbours(names: Sequence[str], seed: bytes, degree: int) -> tuple[tuple[int, ...], ...]:
    """For each of `names`, the places of its neighbours, ascending; symmetric.

    Raises: SecureSumError for a degree that is neither even and below n - 1, nor n - 1.
    """
    count = len(names)
    _require_degree(degree, count)
    if degree == count - 1:
        return tuple(tuple(j for j in range(count) if j != i) for i in range(count))
    order = ring(names, seed)
    found: list[tuple[int, ...]] = [()] * count
    for at, place in enumerate(order):
        found[place] = _around(order, at, degree)
    return tuple(found)


def neighbours_of(place: int, names: Sequence[str], seed: bytes, degree: int) -> tuple[int, ...]:
    """The row of `neighbours` for one place, without the others. Raises: as that."""
    _require_degree(degree, len(names))
    if degree == len(names) - 1:
        return tuple(other for other in range(len(names)) if other != place)
    order = ring(names, seed)
    return _around(order, order.index(place), degree)


def _around(order: Sequence[int], at: int, degree: int) -> tuple[int, ...]:
    steps = (step for step in range(-(degree // 2), degree // 2 + 1) if step)
    return tuple(sorted(order[(at + step) % len(order)] for step in steps))


def _require_degree(degree: int, count: int) -> None:
    if degree != count - 1 and (degree % 2 or not 2 <= degree < count - 1):
        raise SecureSumError(
            f"degree: expected {count - 1}, or an even number below it, found {degree}"
        )


def _count(share: float, clients: int) -> int:
    return floor(share * clients + 1e-9)  # 0.29·100 is meant to be 29
