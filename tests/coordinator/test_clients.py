# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from coordinator.clients import choose_clients, client_rank, client_seed


def test_choice_depends_on_seed_and_round_alone() -> None:
    names = [f"c{number:03d}" for number in range(50)]
    first = choose_clients(names, 10, seed=1, number=3)
    assert first == choose_clients(names[::-1], 10, seed=1, number=3) == sorted(first)
    assert len(set(first)) == 10
    assert first != choose_clients(names, 10, seed=1, number=4)
    assert first != choose_clients(names, 10, seed=2, number=3)
    assert choose_clients(names, 0, seed=1, number=3) == names
    assert choose_clients(names, 60, seed=1, number=3) == names


def test_a_rank_is_a_client_s_for_good() -> None:
    names = [f"c{number:03d}" for number in range(300)]
    ranks = [client_rank((4, 8, 16), name) for name in names]
    assert ranks == [client_rank((4, 8, 16), name) for name in names]
    assert all(60 < ranks.count(rank) < 140 for rank in (4, 8, 16)), "about a third each"
    assert client_rank((), "c000") == 0


def test_seeds_differ_by_run_round_and_client() -> None:
    seeds = {client_seed(s, n, c) for s in (0, 1) for n in (1, 2) for c in ("a", "b")}
    assert len(seeds) == 8 and all(0 <= seed < 2**63 for seed in seeds)
