# SPDX-License-Identifier: Apache-2.0
"""From a data set and a partition to the data of each client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from client_sdk.data.held_out import held_out_count
from simulations.datasets.dataset import Arrays, Dataset, take
from simulations.datasets.domains import mixed_domains, shift_each
from simulations.errors import PartitionError
from simulations.partitions import partition_named
from simulations.partitions.domains import Domains
from simulations.partitions.partitioner import Partitioner

# What a generator is for: each use has its own stream, so that, for example, another held-out
# share leaves the partition as it was.
_SPLIT, _CLIENT, _CLIENT_DOMAINS, _TEST_DOMAINS, _VALIDATION = range(5)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientData:
    """One client's raw arrays, with "labels"; `held_out` may have no rows.

    `domain` is a name of `datasets.domains.DOMAINS`, "mixed", or None where the images are as they
    came.
    """

    id: str
    fit: Arrays
    held_out: Arrays
    domain: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Federation:
    """The clients of a simulated run, and what is not among them.

    `skipped` names each client that got no examples, with the reason; `notes` are sentences for
    the report. `test` is the data set's test part, moved to all domains where the partition has
    them; `test_domains` int64 [n_test] then says which (an index into
    `datasets.domains.DOMAINS`). `validation` is a part that was taken off it, for the coordinator
    to choose by; it may have no rows.
    """

    clients: tuple[ClientData, ...]
    skipped: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    test: Arrays
    validation: Arrays
    test_domains: np.ndarray | None = None


def make_clients(
    dataset: Dataset,
    partition: Partitioner | str,
    n: int,
    *,
    held_out: float = 0.2,
    samples_per_client: int = 0,
    validation: float = 0.0,
    seed: int,
) -> Federation:
    """Deals the training examples to `n` clients.

    Every client keeps at most `samples_per_client` examples, drawn at random (0 keeps all), and
    holds out the share `held_out` of what it keeps: at least one example if it has two, never its
    last. The share `validation` of the test part is set apart, and no longer tested. The same
    arguments give the same arrays.

    Raises: PartitionError for settings that do not fit each other or the data set.
    """
    if not 0 <= held_out < 1:
        raise PartitionError(f"held_out: expected a share of 0 to below 1, found {held_out}")
    if not 0 <= validation < 1:
        raise PartitionError(f"validation: expected a share of 0 to below 1, found {validation}")
    if samples_per_client < 0:
        raise PartitionError(
            f"samples_per_client: expected at least 0 (0 keeps all), found {samples_per_client}"
        )
    if isinstance(partition, str):
        partition = partition_named(partition)
    by_group = partition.column == "groups"
    column = dataset.groups if by_group else dataset.train["labels"]
    if column is None:
        raise PartitionError(
            f"natural: expected a data set that says who each example came from, {dataset.name} "
            'does not; take another partition, or give jsonl lines the key "client"'
        )
    domains = partition if isinstance(partition, Domains) else None
    if domains is not None and dataset.kind != "image":
        raise PartitionError(
            f"domains: expected a data set of images, {dataset.name} holds {dataset.kind}"
        )

    parts = partition.split(column, n, np.random.default_rng([seed, _SPLIT]))
    clients: list[ClientData] = []
    skipped: list[tuple[str, str]] = []
    for number, part in enumerate(parts):
        if len(part) == 0:
            skipped.append((f"client-{number:04d}", "the partition gave it no examples"))
            continue
        fit, held = _split_client(
            part, held_out, samples_per_client, np.random.default_rng([seed, _CLIENT, number])
        )
        rows = take(dataset.train, np.concatenate([fit, held]))
        if domains is not None:
            rng = np.random.default_rng([seed, _CLIENT_DOMAINS, number])
            # Drawn apart, so that a small held-out part has as many domains as it can hold.
            which = np.concatenate(
                [domains.image_domains(number, len(some), rng) for some in (fit, held)]
            )
            rows["images"] = shift_each(rows["images"], which, rng)
        clients.append(
            ClientData(
                id=str(column[part[0]]) if by_group else f"client-{number:04d}",
                fit={key: array[: len(fit)] for key, array in rows.items()},
                held_out={key: array[len(fit) :] for key, array in rows.items()},
                domain=None if domains is None else domains.client_domain(number),
            )
        )
    test, test_domains = _test_part(dataset, domains, seed)
    chosen, kept = _apart(len(test["labels"]), validation, seed)
    validation_part = take(test, chosen)
    if len(chosen):
        test = take(test, kept)
        test_domains = None if test_domains is None else test_domains[kept]
    return Federation(
        clients=tuple(clients),
        skipped=tuple(skipped),
        notes=_notes(column, parts, skipped, by_group=by_group),
        test=test,
        validation=validation_part,
        test_domains=test_domains,
    )


def apart(test: Arrays, validation: float, seed: int) -> tuple[Arrays, Arrays]:
    """The test part without the share `validation` of it, and that share."""
    chosen, kept = _apart(len(test["labels"]), validation, seed)
    return take(test, kept), take(test, chosen)


def label_distribution(clients: Sequence[ClientData], classes: int) -> np.ndarray:
    """How many examples of each class a client holds, fit and held-out together.

    Returns: int64 [n_clients, classes].
    """
    counts = [
        np.bincount(
            np.concatenate([client.fit["labels"], client.held_out["labels"]]), minlength=classes
        )
        for client in clients
    ]
    return np.array(counts, dtype=np.int64).reshape(len(clients), classes)


def _split_client(
    part: np.ndarray, held_out: float, cap: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    order = rng.permutation(part)
    if cap:
        order = order[:cap]
    held = held_out_count(len(order), held_out)
    return order[held:], order[:held]


def _apart(samples: int, validation: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The places that are set apart, and the others, each in order."""
    order = np.random.default_rng([seed, _VALIDATION]).permutation(samples)
    chosen, kept = np.split(order, [round(validation * samples)])
    return np.sort(chosen), np.sort(kept)


def _test_part(
    dataset: Dataset, domains: Domains | None, seed: int
) -> tuple[Mapping[str, np.ndarray], np.ndarray | None]:
    if domains is None:
        return dataset.test, None
    rng = np.random.default_rng([seed, _TEST_DOMAINS])
    which = mixed_domains(len(dataset.test["labels"]), rng)
    return {**dataset.test, "images": shift_each(dataset.test["images"], which, rng)}, which


def _notes(
    column: np.ndarray,
    parts: Sequence[np.ndarray],
    skipped: Sequence[tuple[str, str]],
    *,
    by_group: bool,
) -> tuple[str, ...]:
    notes = []
    if skipped:
        notes.append(
            f"{len(skipped)} of {len(parts)} clients got no examples and are skipped: "
            f"{', '.join(name for name, _ in skipped)}"
        )
    if by_group:
        groups = len(np.unique(column))
        unused = len(column) - sum(len(part) for part in parts)
        if groups > len(parts):
            notes.append(
                f"the {len(parts)} largest of {groups} groups are clients; {groups - len(parts)} "
                f"smaller ones, with {unused} examples, are left out"
            )
    return tuple(notes)
