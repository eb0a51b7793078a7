# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulations.clients import ClientData, Federation, label_distribution, make_clients
from simulations.datasets.dataset import Dataset
from simulations.datasets.domains import inversion
from simulations.errors import PartitionError
from simulations.partitions import Dirichlet, Iid


def images(n: int, classes: int = 4) -> dict[str, np.ndarray]:
    """Image i is flat and says i, so that a client's images tell which examples it holds."""
    numbers = np.arange(n, dtype=np.uint8)
    return {
        "images": np.broadcast_to(numbers[:, None, None], (n, 4, 4)).copy(),
        "labels": np.arange(n, dtype=np.int64) % classes,
    }


def dataset(n: int = 60, groups: np.ndarray | None = None) -> Dataset:
    return Dataset(
        name="toy",
        kind="image",
        train=images(n),
        test=images(11),
        class_names=("a", "b", "c", "d"),
        groups=groups,
    )


def numbers(arrays) -> list[int]:
    return arrays["images"][:, 0, 0].tolist()


def fingerprint(federation: Federation) -> list[tuple[str, bytes, bytes]]:
    return [
        (c.id, c.fit["images"].tobytes(), c.held_out["labels"].tobytes())
        for c in federation.clients
    ]


@given(
    partition=st.sampled_from(["iid", "dirichlet:0.1", "shards:2"]),
    n=st.integers(1, 30),
    held_out=st.sampled_from([0.0, 0.2, 0.5, 0.99]),
    cap=st.integers(0, 8),
    seed=st.integers(0, 2**32),
)
def test_clients_share_nothing_and_keep_the_promises(
    partition: str, n: int, held_out: float, cap: int, seed: int
) -> None:
    data = dataset()
    settings = {"held_out": held_out, "samples_per_client": cap, "seed": seed}
    made = make_clients(data, partition, n, **settings)
    assert fingerprint(made) == fingerprint(make_clients(data, partition, n, **settings))
    held_by_all: list[int] = []
    for client in made.clients:
        fit, held = numbers(client.fit), numbers(client.held_out)
        total = len(fit) + len(held)
        assert len(fit) >= 1
        assert not cap or total <= cap
        assert (len(held) > 0) == (held_out > 0 and total > 1)
        assert total < 5 or len(fit) == 1 or abs(len(held) - total * held_out) <= 0.5
        assert [i % 4 for i in fit] == client.fit["labels"].tolist()
        assert client.domain is None
        held_by_all += fit + held
    assert len(set(held_by_all)) == len(held_by_all)
    assert cap or len(held_by_all) == 60
    ids = [c.id for c in made.clients] + [name for name, _ in made.skipped]
    assert sorted(ids) == [f"client-{i:04d}" for i in range(n)]
    assert made.test is data.test and made.test_domains is None


def test_clients_without_examples_are_skipped_visibly() -> None:
    made = make_clients(dataset(3), Iid(), 5, seed=0)
    assert [client.id for client in made.clients] == ["client-0000", "client-0001", "client-0002"]
    assert made.skipped == (
        ("client-0003", "the partition gave it no examples"),
        ("client-0004", "the partition gave it no examples"),
    )
    assert made.notes == (
        "2 of 5 clients got no examples and are skipped: client-0003, client-0004",
    )
    assert all(len(client.held_out["labels"]) == 0 for client in made.clients)
    assert made.clients[0].held_out["images"].shape == (0, 4, 4)


def test_partition_stays_when_another_share_is_held_out() -> None:
    def holdings(held_out: float) -> list[list[int]]:
        made = make_clients(dataset(), "dirichlet:0.3", 6, held_out=held_out, seed=5)
        return [sorted(numbers(c.fit) + numbers(c.held_out)) for c in made.clients]

    assert holdings(0.1) == holdings(0.5)


def test_natural_clients_carry_the_names_of_their_groups() -> None:
    groups = np.array(["x", "y", "x", "z", "x", "y"] * 10)
    made = make_clients(dataset(groups=groups), "natural", 2, held_out=0.0, seed=0)
    assert [client.id for client in made.clients] == ["x", "y"]
    assert sorted(numbers(made.clients[1].fit)) == np.flatnonzero(groups == "y").tolist()
    assert made.notes == (
        "the 2 largest of 3 groups are clients; 1 smaller ones, with 10 examples, are left out",
    )
    numbered = make_clients(dataset(groups=np.arange(60) % 2), "natural", 2, seed=0)
    assert [client.id for client in numbered.clients] == ["0", "1"] and numbered.notes == ()


def test_one_domain_per_client_moves_all_its_images() -> None:
    data = dataset()
    plain = make_clients(data, "iid", 6, seed=0)
    made = make_clients(data, "domains:one-per-client", 6, seed=0)
    assert [c.domain for c in made.clients] == [
        "identity",
        "rotation",
        "inversion",
        "blur",
        "noise",
        "identity",
    ]
    assert numbers(made.clients[5].fit) == numbers(plain.clients[5].fit)
    assert np.array_equal(
        made.clients[2].held_out["images"], inversion(plain.clients[2].held_out["images"])
    )


def test_mixed_domains_move_clients_and_test_images() -> None:
    data = dataset()
    before = data.train["images"].tobytes()
    made = make_clients(data, "domains:mixed,dirichlet:0.5", 5, seed=0)
    plain = make_clients(data, Dirichlet(alpha=0.5), 5, seed=0)
    for client, same in zip(made.clients, plain.clients, strict=True):
        assert client.domain == "mixed"
        assert np.array_equal(client.fit["labels"], same.fit["labels"])
        unchanged = (client.fit["images"] == same.fit["images"]).all(axis=(1, 2))
        inverted = (client.fit["images"] == inversion(same.fit["images"])).all(axis=(1, 2))
        assert inverted.sum() >= len(inverted) // 5
        assert unchanged.sum() <= np.ceil(len(unchanged) / 5) * 2  # blur leaves flat images
    assert made.test_domains is not None
    assert sorted(np.bincount(made.test_domains)) == [2, 2, 2, 2, 3]
    inverted_tests = made.test_domains == 2
    assert np.array_equal(
        made.test["images"][inverted_tests], inversion(data.test["images"][inverted_tests])
    )
    assert np.array_equal(made.test["labels"], data.test["labels"])
    again = make_clients(data, "domains:mixed,dirichlet:0.5", 5, seed=0)
    assert made.test["images"].tobytes() == again.test["images"].tobytes()
    assert fingerprint(made) == fingerprint(again)
    assert data.train["images"].tobytes() == before


def test_make_clients_is_refused_when_settings_do_not_fit() -> None:
    with pytest.raises(PartitionError, match="share of 0 to below 1, found 1"):
        make_clients(dataset(), "iid", 2, held_out=1.0, seed=0)
    with pytest.raises(PartitionError, match="samples_per_client: expected at least 0"):
        make_clients(dataset(), "iid", 2, samples_per_client=-1, seed=0)
    with pytest.raises(PartitionError, match=r'toy does not; .* the key "client"'):
        make_clients(dataset(), "natural", 2, seed=0)
    tokens = {
        "input_ids": np.ones((4, 3), np.int64),
        "attention_mask": np.ones((4, 3), np.int64),
        "labels": np.zeros(4, np.int64),
    }
    words = Dataset(name="words", kind="text", train=tokens, test=tokens, class_names=("a",))
    with pytest.raises(PartitionError, match="expected a data set of images, words holds text"):
        make_clients(words, "domains:mixed", 2, seed=0)
    assert len(make_clients(words, "iid", 2, seed=0).clients) == 2


def test_label_distribution_counts_all_that_a_client_holds() -> None:
    made = make_clients(dataset(), "shards:1", 4, seed=0)
    counts = label_distribution(made.clients, 5)
    assert counts.shape == (4, 5) and counts.dtype == np.int64
    assert counts.sum(axis=0).tolist() == [15, 15, 15, 15, 0]
    client = ClientData(
        id="c",
        fit={"labels": np.array([1, 1])},
        held_out={"labels": np.array([2])},
    )
    assert label_distribution([client], 3).tolist() == [[0, 2, 1]]
    assert label_distribution([], 3).shape == (0, 3)


@pytest.mark.parametrize("partition", ["iid", "domains:mixed,iid"])
def test_validation_is_taken_off_the_test_part(partition):
    data = dataset()
    plain = make_clients(data, partition, 4, seed=0)
    made = make_clients(data, partition, 4, validation=0.25, seed=0)
    count = len(plain.test["labels"])
    assert len(plain.validation["labels"]) == 0
    assert len(made.validation["labels"]) == round(count / 4)
    assert fingerprint_of_rows(made.validation) + fingerprint_of_rows(made.test) == (
        fingerprint_of_rows(plain.test)
    )
    if made.test_domains is not None:
        assert len(made.test_domains) == len(made.test["labels"])
    for one, other in zip(plain.clients, made.clients, strict=True):
        np.testing.assert_array_equal(one.fit["labels"], other.fit["labels"])
    with pytest.raises(PartitionError, match="validation"):
        make_clients(data, partition, 4, validation=1.0, seed=0)


def fingerprint_of_rows(arrays) -> Counter[bytes]:
    return Counter(
        image.tobytes() + label.tobytes()
        for image, label in zip(arrays["images"], arrays["labels"], strict=True)
    )
