# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulations.errors import PartitionError
from simulations.partitions import (
    Dirichlet,
    Domains,
    Iid,
    Natural,
    Partitioner,
    Shards,
    partition_named,
)

COMPLETE = (
    Iid(),
    Dirichlet(alpha=0.001),
    Dirichlet(alpha=0.3),
    Dirichlet(alpha=1e6),
    Shards(per_client=1),
    Shards(per_client=2),
    Domains(per_client=5),
    Domains(per_client=1, base=Dirichlet(alpha=0.3)),
)
columns = st.lists(st.integers(0, 6), min_size=24, max_size=120).map(
    lambda labels: np.array(labels, dtype=np.int64)
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@given(
    partition=st.sampled_from((*COMPLETE, Natural())),
    column=columns,
    n=st.integers(1, 12),
    seed=st.integers(0, 2**32),
)
def test_split_is_disjoint_sorted_and_deterministic(
    partition: Partitioner, column: np.ndarray, n: int, seed: int
) -> None:
    n = min(n, len(np.unique(column))) if partition.column == "groups" else n
    before = column.tobytes()
    parts = partition.split(column, n, rng(seed))
    again = partition.split(column, n, rng(seed))
    assert len(parts) == n
    assert [part.tolist() for part in parts] == [part.tolist() for part in again]
    everything = np.concatenate(parts)
    assert np.issubdtype(everything.dtype, np.integer)
    assert len(set(everything.tolist())) == len(everything)
    assert all((np.diff(part) > 0).all() for part in parts)
    assert column.tobytes() == before
    if partition.column == "labels":
        assert sorted(everything.tolist()) == list(range(len(column)))


@pytest.mark.parametrize("partition", [*COMPLETE, Natural()])
def test_split_is_refused_when_there_is_nothing_to_split(partition: Partitioner) -> None:
    with pytest.raises(PartitionError, match="at least 1 client, found 0"):
        partition.split(np.zeros(5, np.int64), 0, rng())
    with pytest.raises(PartitionError, match="at least one example"):
        partition.split(np.zeros(0, np.int64), 2, rng())


@given(column=columns, n=st.integers(1, 200), seed=st.integers(0, 99))
def test_iid_sizes_differ_by_at_most_one(column: np.ndarray, n: int, seed: int) -> None:
    sizes = [len(part) for part in Iid().split(column, n, rng(seed))]
    assert max(sizes) - min(sizes) <= 1


def test_dirichlet_gets_more_uneven_when_alpha_falls() -> None:
    column = np.arange(10_000) % 10

    def unevenness(alpha: float) -> float:
        parts = Dirichlet(alpha=alpha).split(column, 20, rng(1))
        counts = np.array([np.bincount(column[part], minlength=10) for part in parts])
        return float(np.abs(counts / 1000 - 1 / 20).sum())

    spread = [unevenness(alpha) for alpha in (0.05, 0.3, 3.0, 1e5)]
    assert spread == sorted(spread, reverse=True)
    assert spread[-1] < 0.5 and spread[0] > 10


def test_dirichlet_shares_have_the_distribution_when_drawn_often() -> None:
    # One class over 4 clients, symmetric Dirichlet(a): a share has mean 1/4 and variance
    # (1/4)(3/4)/(4a + 1).
    column, alpha = np.zeros(1000, np.int64), 0.5
    generator = rng(3)
    shares = np.array(
        [
            [len(part) / 1000 for part in Dirichlet(alpha=alpha).split(column, 4, generator)]
            for _ in range(2000)
        ]
    )
    assert np.abs(shares.mean(axis=0) - 0.25).max() < 0.02
    assert np.abs(shares.var(axis=0) - 3 / 16 / 3).max() < 0.006


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf"), 1e-9, 1e9])
def test_dirichlet_is_refused_when_alpha_is_out_of_range(alpha: float) -> None:
    with pytest.raises(PartitionError, match=r"expected alpha of 0.001 to 1e\+06"):
        Dirichlet(alpha=alpha)


@given(column=columns, n=st.integers(1, 12), per_client=st.integers(1, 2), seed=st.integers(0, 99))
def test_shards_give_few_classes_and_even_sizes(
    column: np.ndarray, n: int, per_client: int, seed: int
) -> None:
    parts = Shards(per_client=per_client).split(column, n, rng(seed))
    assert max(map(len, parts)) - min(map(len, parts)) <= per_client
    # A shard spans a run of the sorted labels: all runs together cross no more class borders than
    # there are.
    crossings = sum(len(np.unique(column[part])) for part in parts) - n * per_client
    assert crossings <= len(np.unique(column)) - 1


def test_shards_are_refused_when_there_are_too_few_examples() -> None:
    with pytest.raises(PartitionError, match="at least 6 examples for 3 clients, found 5"):
        Shards(per_client=2).split(np.zeros(5, np.int64), 3, rng())
    with pytest.raises(PartitionError, match="at least 1 shard a client, found 0"):
        Shards(per_client=0)


def test_natural_takes_the_largest_groups_in_order() -> None:
    groups = np.array(["b", "c", "a", "c", "b", "d", "c"])
    parts = Natural().split(groups, 3, rng())
    assert [part.tolist() for part in parts] == [[1, 3, 6], [0, 4], [2]]  # c, b, then a before d
    with pytest.raises(PartitionError, match=r"at most 4 clients, .* found 5"):
        Natural().split(groups, 5, rng())


def test_domains_say_which_domain_each_image_has() -> None:
    mixed, one = Domains(per_client=5), Domains(per_client=1)
    assert mixed.client_domain(3) == "mixed"
    assert [one.client_domain(i) for i in (0, 1, 6)] == ["identity", "rotation", "rotation"]
    assert one.image_domains(7, 3, rng()).tolist() == [2, 2, 2]
    assert sorted(mixed.image_domains(7, 10, rng())) == sorted([*range(5), *range(5)])
    two = Domains(per_client=2)
    assert [two.client_domain(i) for i in (0, 4)] == ["identity+rotation", "identity+noise"]
    assert sorted(two.image_domains(3, 6, rng())) == [3, 3, 3, 4, 4, 4]
    for wrong in (0, 6):
        with pytest.raises(PartitionError, match=f"1 to 5 domains a client, found {wrong}"):
            Domains(per_client=wrong)
    with pytest.raises(PartitionError, match="under the domains"):
        Domains(per_client=5, base=mixed)


@pytest.mark.parametrize(
    ("name", "partition"),
    [
        ("iid", Iid()),
        ("natural", Natural()),
        ("dirichlet:0.3", Dirichlet(alpha=0.3)),
        ("dirichlet:.5", Dirichlet(alpha=0.5)),
        ("dirichlet:1e-2", Dirichlet(alpha=0.01)),
        ("shards:2", Shards(per_client=2)),
        ("domains", Domains(per_client=5)),
        ("domains:mixed", Domains(per_client=5)),
        ("domains:one-per-client", Domains(per_client=1)),
        ("domains:mixed,dirichlet:0.3", Domains(per_client=5, base=Dirichlet(alpha=0.3))),
        ("domains:2", Domains(per_client=2)),
        ("domains:3,shards:2", Domains(per_client=3, base=Shards(per_client=2))),
        ("domains:one-per-client,natural", Domains(per_client=1, base=Natural())),
    ],
)
def test_partition_named_reads_every_form(name: str, partition: Partitioner) -> None:
    assert partition_named(name) == partition


@pytest.mark.parametrize(
    "name",
    [
        "",
        "IID",
        "iid:",
        "iid,iid",
        "iid,domains:mixed",
        "natural:2",
        "dirichlet",
        "dirichlet:",
        "dirichlet:nan",
        "dirichlet:-1",
        "dirichlet:0.3,iid",
        "shards",
        "shards:1.5",
        "shards:9999999999",
        "domains:",
        "domains:fog",
        "domains:mixed,",
        "domains:mixed,domains:mixed",
        "domains:mixed,iid,iid",
        "domains," * 2000,
    ],
)
def test_partition_named_lists_the_known_when_unknown(name: str) -> None:
    with pytest.raises(PartitionError, match="expected one of iid, dirichlet:ALPHA"):
        partition_named(name)


@pytest.mark.parametrize("name", ["dirichlet:0", "shards:0", "domains:mixed,dirichlet:1e300"])
def test_partition_named_says_what_is_allowed_when_a_setting_is_bad(name: str) -> None:
    with pytest.raises(PartitionError, match=r"expected (alpha of|at least 1 shard)"):
        partition_named(name)
