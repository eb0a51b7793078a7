# SPDX-License-Identifier: Apache-2.0
"""A folder of jsonl: a line is {"text": "...", "label": "..." or 3, "client": "..." (optional)}."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from simulations.datasets.dataset import Dataset, stratified_split
from simulations.errors import DataError

MAX_LINE_BYTES = 1 << 20
MAX_CLIENT_CHARACTERS = 200
TEST_FRACTION = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class _Record:
    text: str
    label: str | int
    client: str | None
    where: str  # file:line


def load_jsonl_folder(folder: Path, *, seed: int) -> Dataset:
    """Reads `train.jsonl` and `test.jsonl`; with other names all *.jsonl are read as one, and a
    stratified fifth of it, chosen by `seed`, is the test set.

    Labels are all strings or all integers; the classes are the sorted training labels. Other keys
    of a line are allowed and not used. The natural partition needs "client" on every training line.

    Raises: DataError with file:line, what was expected and what was found.
    """
    files = sorted(folder.glob("*.jsonl"))
    stems = [file.stem for file in files]
    if not files:
        raise DataError(f"{folder}: expected at least one .jsonl file, found none")
    if "test" in stems and stems != ["test", "train"]:
        raise DataError(
            f"{folder}: expected train.jsonl beside test.jsonl and no other .jsonl, found "
            f"{', '.join(file.name for file in files)}"
        )
    if "test" in stems:
        train = list(_records(folder / "train.jsonl"))
        test = list(_records(folder / "test.jsonl"))
        names = _class_names(train)
    else:
        every = [record for file in files for record in _records(file)]
        names = _class_names(every)
        kept, held = stratified_split(
            _labels(every, names), TEST_FRACTION, np.random.default_rng([seed, 0x7E87])
        )
        train, test = [every[i] for i in kept], [every[i] for i in held]
    return Dataset(
        name=folder.name,
        kind="text",
        train={"texts": _texts(train), "labels": _labels(train, names)},
        test={"texts": _texts(test), "labels": _labels(test, names)},
        class_names=tuple(str(name) for name in names),
        groups=_groups(train),
    )


def _records(file: Path) -> Iterator[_Record]:
    empty = True
    try:
        with file.open("rb") as lines:
            number = 0
            while line := lines.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(
                        f"{file}:{number}: expected at most {MAX_LINE_BYTES} bytes in a line, "
                        "found more"
                    )
                if line.strip():
                    empty = False
                    yield _record(line, f"{file}:{number}")
    except OSError as error:
        raise DataError(f"{file}: expected a readable file, found {error}") from error
    if empty:
        raise DataError(f"{file}: expected at least one line, found none")


def _record(line: bytes, where: str) -> _Record:
    try:
        value = json.loads(line.decode("utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise DataError(f"{where}: expected one JSON object in UTF-8, found {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(value).__name__}")
    for key in ("text", "label"):
        if key not in value:
            raise DataError(
                f'{where}: expected the key "{key}", found {", ".join(map(repr, value)) or "none"}'
            )
    text, label, client = value["text"], value["label"], value.get("client")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f'{where}: expected "text" as a string with content, found {text!r:.80}')
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise DataError(f'{where}: expected "label" as a string or an integer, found {label!r:.80}')
    if client is not None:
        if isinstance(client, bool) or not isinstance(client, str | int):
            raise DataError(f'{where}: expected "client" as a string or integer, found {client!r}')
        client = str(client)
        if not (client.isprintable() and 0 < len(client) <= MAX_CLIENT_CHARACTERS):
            raise DataError(
                f'{where}: expected "client" of 1 to {MAX_CLIENT_CHARACTERS} printable characters, '
                f"found {client!r:.80}"
            )
    return _Record(text=text, label=label, client=client, where=where)


def _class_names(records: list[_Record]) -> list[str | int]:
    kind = type(records[0].label)
    for record in records:
        if type(record.label) is not kind:
            raise DataError(
                f"{record.where}: expected a label of type {kind.__name__} as at "
                f"{records[0].where}, found {record.label!r}"
            )
    return sorted({record.label for record in records}, key=lambda name: (str(kind), name))


def _labels(records: list[_Record], names: list[str | int]) -> np.ndarray:
    index = {name: i for i, name in enumerate(names)}
    for record in records:
        if record.label not in index:
            raise DataError(
                f"{record.where}: expected a label that the training lines have "
                f"({', '.join(map(str, names[:20]))}), found {record.label!r}"
            )
    return np.array([index[record.label] for record in records], dtype=np.int64)


def _texts(records: list[_Record]) -> np.ndarray:
    texts = np.empty(len(records), dtype=object)
    texts[:] = [record.text for record in records]
    return texts


def _groups(train: list[_Record]) -> np.ndarray | None:
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
