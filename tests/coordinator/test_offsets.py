# SPDX-License-Identifier: Apache-2.0
"""What each client still has to hear of moved weights."""

from __future__ import annotations

import numpy as np

from aggregation.mergers import BaseChange
from aggregation.offsets import moved, unpack_changes
from coordinator.offsets import AT_REST, Offsets
from protocol.factors import FactorPair
from protocol.tensors import ParamSpec

PAIRS = (FactorPair(down="a", up="b", scale=1.0, base="w"),)
SPEC = ParamSpec.of({"a": np.zeros((2, 40), "f4"), "b": np.zeros((50, 2), "f4")})


def change(seed: int) -> dict[str, BaseChange]:
    rng = np.random.default_rng(seed)
    left, right = (rng.standard_normal(shape).astype("f4") for shape in ((50, 3), (3, 40)))
    return {"a": BaseChange(left=left, right=right)}


def heard(offsets: Offsets, held_round: int, holds: bool, held: dict[str, np.ndarray]):
    parcel = offsets.parcel(PAIRS, held_round, holds)
    changes = unpack_changes(parcel.payload, parcel.ranks, PAIRS, SPEC)
    return parcel, moved(held if parcel.base_round else {}, changes)


def test_nothing_is_said_while_nothing_has_moved() -> None:
    for holds in (True, False):
        parcel = AT_REST.parcel(PAIRS, 3, holds)
        assert (parcel.base_round, parcel.ranks, parcel.payload) == (0, (), b"")
    assert AT_REST.weights(PAIRS) == {}


def test_the_first_change_goes_to_everybody_as_factors() -> None:
    offsets = AT_REST.after(change(0))
    for holds in (True, False):
        parcel, seen = heard(offsets, 1, holds, {})
        assert parcel.base_round == 0 and parcel.ranks == (3,)
        assert len(parcel.payload) == 4 * 3 * (50 + 40)
        assert seen["a"].tobytes() == offsets.weights(PAIRS)["w"].tobytes()


def test_later_who_holds_the_rest_hears_the_last_change_and_others_all_of_it() -> None:
    before = AT_REST.after(change(0))
    offsets = before.after(change(1))
    holder, by_change = heard(offsets, 2, True, before.total)
    other, by_all = heard(offsets, 2, False, {})
    assert holder.base_round == 2 and holder.ranks == (3,)
    assert other.base_round == 0 and other.ranks == (-1,)
    assert len(holder.payload) < len(other.payload) == 4 * 50 * 40
    assert by_change["a"].tobytes() == by_all["a"].tobytes() == offsets.total["a"].tobytes()


def test_a_round_that_merged_nothing_moves_nothing() -> None:
    before = AT_REST.after(change(0)).after(change(1))
    offsets = before.after({})
    holder, by_change = heard(offsets, 3, True, before.total)
    assert (holder.base_round, holder.ranks, holder.payload) == (3, (), b"")
    _, by_all = heard(offsets, 3, False, {})
    assert by_change["a"].tobytes() == by_all["a"].tobytes() == before.total["a"].tobytes()
