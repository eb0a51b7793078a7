# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st

from coordinator.clients import choose_clients, client_rank, client_seed, eligible
from protocol.readiness import Readiness

numbers = st.none() | st.integers(0, 9)
surveys = st.dictionaries(
    st.sampled_from("abcdefgh"),
    st.builds(
        Readiness, ready=st.booleans(), reason=st.sampled_from(["", "no mains"]),
        samples=numbers, free_memory_mb=numbers,
    ),
)  # fmt: skip


def oracle(said: Mapping[str, Readiness], samples: int, memory: int) -> set[str]:
    """Word by word: ready, and so many samples and so much memory where they are asked for."""
    able = set()
    for name in said:
        if not said[name].ready:
            continue
        has = said[name].samples if said[name].samples is not None else -1
        free = said[name].free_memory_mb if said[name].free_memory_mb is not None else -1
        if samples > 0 and has < samples:
            continue
        if memory > 0 and free < memory:
            continue
        able.add(name)
    return able


@given(said=surveys, samples=st.integers(0, 9), memory=st.integers(0, 9))
def test_eligible_are_the_ready_that_have_what_is_asked_for(
    said: dict[str, Readiness], samples: int, memory: int
) -> None:
    able, why = eligible(said, min_samples=samples, min_memory_mb=memory)
    assert able == sorted(oracle(said, samples, memory))
    assert why.keys() == said.keys() - set(able) and all(why.values())


def test_reasons_say_what_a_client_has_and_what_is_asked_for() -> None:
    said = {
        "a": Readiness(ready=False, reason="runs on battery"),
        "b": Readiness(samples=3),
        "c": Readiness(samples=9),
        "d": Readiness(ready=False),
    }
    assert eligible(said, min_samples=5, min_memory_mb=64)[1] == {
        "a": "runs on battery",
        "b": "it has 3 samples, rounds.min_samples asks for 5",
        "c": "it has an unknown number of MiB of free memory, rounds.min_memory_mb asks for 64",
        "d": "it says that it is not ready, and not why",
    }


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
