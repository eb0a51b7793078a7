# SPDX-License-Identifier: Apache-2.0
"""A folder of jsonl: a line is {"text": "...", "label": "..." or 3, "client": "..." (optional)}."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from client_sdk.data.jsonl import (
    Record,
    part_files,
    read_records,
    require_one_label_type,
    text_array,
)
from simulations.datasets.dataset import Dataset, stratified_split
from simulations.errors import DataError

TEST_FRACTION = 0.2


def load_jsonl_folder(folder: Path, *, seed: int) -> Dataset:
    """Reads `train.jsonl` and `test.jsonl`; with other names all *.jsonl are read as one, and a
    stratified fifth of it, chosen by `seed`, is the test set.

    Labels are all strings or all integers; the classes are the sorted training labels. Other keys
    of a line are allowed and not used. The natural partition needs "client" on every training line.

    Raises: DataError, of this package or of client_sdk, with file:line, what was expected and what
    was found.
    """
    train_files, test_files = part_files(folder)
    every = [record for file in train_files for record in read_records(file)]
    names = _class_names(every)
    if test_files:
        train, test = every, [record for file in test_files for record in read_records(file)]
    else:
        kept, held = stratified_split(
            _labels(every, names), TEST_FRACTION, np.random.default_rng([seed, 0x7E87])
        )
        train, test = [every[i] for i in kept], [every[i] for i in held]
    return Dataset(
        name=folder.name,
        kind="text",
        train=_arrays(train, names),
        test=_arrays(test, names),
        class_names=tuple(str(name) for name in names),
        groups=_groups(train),
    )


def _class_names(records: list[Record]) -> list[str | int]:
    kind = require_one_label_type(records)
    return sorted({record.label for record in records}, key=lambda name: (str(kind), name))


def _arrays(records: list[Record], names: list[str | int]) -> dict[str, np.ndarray]:
    texts = text_array([record.text for record in records])
    return {"texts": texts, "labels": _labels(records, names)}


def _labels(records: list[Record], names: list[str | int]) -> np.ndarray:
    index = {name: i for i, name in enumerate(names)}
    for record in records:
        if record.label not in index:
            raise DataError(
                f"{record.where}: expected a label that the training lines have "
                f"({', '.join(map(str, names[:20]))}), found {record.label!r}"
            )
    return np.array([index[record.label] for record in records], dtype=np.int64)


def _groups(train: list[Record]) -> np.ndarray | None:
    with_client = [record.client for record in train if record.client is not None]
    if not with_client:
        return None
    for record in train:
        if record.client is None:
            raise DataError(
                f'{record.where}: expected "client" on every training line or on none, found none '
                "here but on other lines"
            )
    return np.array(with_client)
