# SPDX-License-Identifier: Apache-2.0
"""Changes of frozen weights: as they are packed, and as they add up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.errors import CodecError
from aggregation.mergers import BaseChange
from aggregation.offsets import (
    arrays_of,
    changes_bytes,
    changes_of,
    most_bytes,
    moved,
    pack_changes,
    unpack_changes,
    whole,
)
from protocol.factors import FactorPair
from protocol.plan import DENSE
from protocol.tensors import ParamSpec

PAIRS = tuple(FactorPair(down=f"{n}.A", up=f"{n}.B", scale=2.0, base=f"{n}.W") for n in "qv")
D, K = 12, 10
SPEC = ParamSpec.of(
    {f"{n}.{f}": np.zeros((4, K) if f == "A" else (D, 4), "f4") for n in "qv" for f in "AB"}
)
RANKS = st.sampled_from([0, DENSE, 1, 2, 5])  # 5 * (12 + 10) <= 12 * 10 < 6 * (12 + 10)


def change(rank: int, seed: int) -> BaseChange | None:
    rng = np.random.default_rng(seed)
    if rank == 0:
        return None
    if rank == DENSE:
        return BaseChange(left=rng.standard_normal((D, K)).astype("f4"), right=None)
    return BaseChange(
        left=rng.standard_normal((D, rank)).astype("f4"),
        right=rng.standard_normal((rank, K)).astype("f4"),
    )


def changes(ranks: tuple[int, ...]) -> dict[str, BaseChange]:
    made = {p.down: change(r, i) for i, (p, r) in enumerate(zip(PAIRS, ranks, strict=True))}
    return {name: one for name, one in made.items() if one is not None}


@given(st.tuples(RANKS, RANKS))
def test_unpacking_gives_back_what_was_packed(ranks: tuple[int, ...]) -> None:
    given_changes = changes(ranks)
    found_ranks, payload = pack_changes(given_changes, PAIRS)
    assert found_ranks == (ranks if any(ranks) else ())
    assert len(payload) == changes_bytes(found_ranks, PAIRS, SPEC) <= most_bytes(PAIRS, SPEC)
    assert len(payload) == sum(one.nbytes for one in given_changes.values())
    found = unpack_changes(payload, found_ranks, PAIRS, SPEC)
    assert found.keys() == given_changes.keys()
    for name, one in given_changes.items():
        assert found[name].product().tobytes() == one.product().tobytes()
        assert arrays_of(changes_of(arrays_of({name: one}))).keys() == arrays_of({name: one}).keys()


@given(st.lists(st.tuples(RANKS, RANKS), min_size=1, max_size=4))
def test_changes_add_up_and_the_sum_is_one_change(rounds: list[tuple[int, ...]]) -> None:
    offsets: dict[str, np.ndarray] = {}
    dense = {pair.down: np.zeros((D, K)) for pair in PAIRS}
    for ranks in rounds:
        offsets = moved(offsets, changes(ranks))
        for name, one in changes(ranks).items():
            right = 1.0 if one.right is None else one.right.astype("f8")
            dense[name] += one.left.astype("f8") @ right if one.right is not None else one.left
    for pair in PAIRS:
        np.testing.assert_allclose(
            offsets.get(pair.down, np.zeros((D, K))), dense[pair.down], rtol=0, atol=1e-4
        )
    late = moved({}, whole(offsets))
    assert all(late[name].tobytes() == value.tobytes() for name, value in offsets.items())


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ((1,), "expected one rank a pair \\(2\\), found 1"),
        ((1, 1, 1), "found 3"),
        ((6, 0), "smaller than their product \\[12, 10\\], found rank 6"),
        ((10**9, 0), "found rank 1000000000"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(ranks: tuple[int, ...], words: str) -> None:
    with pytest.raises(CodecError, match=words):
        changes_bytes(ranks, PAIRS, SPEC)


@pytest.mark.parametrize(
    "spoil", [lambda b: b[:-1], lambda b: b + b"x", lambda b: b"\xff" * len(b)]
)
def test_a_payload_that_does_not_fit_is_refused(spoil) -> None:
    ranks, payload = pack_changes(changes((2, DENSE)), PAIRS)
    with pytest.raises(CodecError):
        unpack_changes(spoil(payload), ranks, PAIRS, SPEC)
