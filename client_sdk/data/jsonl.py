# SPDX-License-Identifier: Apache-2.0
"""Lines of jsonl: {"text": "...", "label": "..." or 3, "client": "..." (optional)}.

On a device a line may have the tokens ready in place of the text: {"input_ids": [101, 7592, 102],
"label": 3}, with "attention_mask": [1, 1, 1] where some of them are padding.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np

from client_sdk.errors import DataError
from protocol.limits import MAX_TOKENS

MAX_LINE_BYTES = 1 << 20
MAX_CLIENT_CHARACTERS = 200

_INT64: Final = np.iinfo(np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One line: a text, or ("" for the text) its tokens."""

    text: str
    label: str | int
    client: str | None
    where: str  # file:line
    ids: tuple[int, ...] = ()
    mask: tuple[int, ...] = ()


def part_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files to train on and those to test on: train.jsonl and test.jsonl, or every .jsonl and
    none. Raises: DataError."""
    files = sorted(folder.glob("*.jsonl"))
    names = [file.name for file in files]
    if not files:
        raise DataError(f"{folder}: expected at least one .jsonl file, found none")
    if "test.jsonl" not in names:
        return files, []
    if names != ["test.jsonl", "train.jsonl"]:
        raise DataError(
            f"{folder}: expected train.jsonl beside test.jsonl and no other .jsonl, found "
            f"{', '.join(names)}"
        )
    return files[1:], files[:1]


def read_records(file: Path, *, tokens: bool = False) -> Iterator[Record]:
    """The lines of a file; with `tokens` they may have "input_ids" in place of "text".

    Raises: DataError with file:line, what was expected and what was found.
    """
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
                    yield _record(line, f"{file}:{number}", tokens=tokens)
    except OSError as error:
        raise DataError(f"{file}: expected a readable file, found {error}") from error
    if empty:
        raise DataError(f"{file}: expected at least one line, found none")


def require_one_label_type(records: Sequence[Record]) -> type:
    """str or int, whichever the labels are. Raises: DataError where they are both."""
    kind = type(records[0].label)
    for record in records:
        if type(record.label) is not kind:
            raise DataError(
                f"{record.where}: expected a label of type {kind.__name__} as at "
                f"{records[0].where}, found {record.label!r}"
            )
    return kind


def text_array(texts: Sequence[str]) -> np.ndarray:
    """Texts as an array of objects, so that a long one does not lengthen the others."""
    array = np.empty(len(texts), dtype=object)
    array[:] = texts
    return array


def arrays_of(records: Sequence[Record]) -> dict[str, np.ndarray]:
    """Raw arrays of a device's lines.

    Shapes: "labels" int64 [n], or objects [n] of class names; "texts" objects [n], or "input_ids"
    and "attention_mask" int64 [n, t], padded right to the longest line.

    Raises: DataError for lines that do not go together.
    """
    if require_one_label_type(records) is str:
        labels = text_array([str(record.label) for record in records])
    else:
        for record in records:
            if not _INT64.min <= int(record.label) <= _INT64.max:
                raise DataError(f'{record.where}: expected "label" within 64 bits')
        labels = np.array([record.label for record in records], dtype=np.int64)
    for before, record in pairwise(records):
        if bool(before.text) != bool(record.text):
            raise DataError(
                f'{record.where}: expected "{"text" if before.text else "input_ids"}" as on the '
                "lines before it; give either on every line"
            )
    if records[0].text:
        return {"texts": text_array([record.text for record in records]), "labels": labels}
    longest = max(len(record.ids) for record in records)
    ids = np.zeros((len(records), longest), np.int64)
    mask = np.zeros_like(ids)
    for row, record in enumerate(records):
        ids[row, : len(record.ids)] = record.ids
        mask[row, : len(record.ids)] = record.mask
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _record(line: bytes, where: str, *, tokens: bool) -> Record:
    try:
        value = json.loads(line.decode("utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise DataError(f"{where}: expected one JSON object in UTF-8, found {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(value).__name__}")
    ready = tokens and "input_ids" in value
    for key in ("input_ids" if ready else "text", "label"):
        if key not in value:
            raise DataError(
                f'{where}: expected the key "{key}", found {", ".join(map(repr, value)) or "none"}'
            )
    text = "" if ready else value["text"]
    label, client = value["label"], value.get("client")
    if not ready and (not isinstance(text, str) or not text.strip()):
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
    ids, mask = _tokens(value, where) if ready else ((), ())
    return Record(text=text, label=label, client=client, where=where, ids=ids, mask=mask)


def _tokens(value: Mapping[str, Any], where: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    ids = _integers(value["input_ids"], f'{where}: "input_ids"', most=np.iinfo(np.int32).max)
    if "attention_mask" not in value:
        return ids, (1,) * len(ids)
    mask = _integers(value["attention_mask"], f'{where}: "attention_mask"', most=1)
    if len(mask) != len(ids):
        raise DataError(
            f'{where}: expected "attention_mask" of {len(ids)} values, one for each of '
            f'"input_ids", found {len(mask)}'
        )
    return ids, mask


def _integers(value: object, what: str, *, most: int) -> tuple[int, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_TOKENS:
        raise DataError(f"{what}: expected a list of 1 to {MAX_TOKENS} integers")
    for number in value:
        if type(number) is not int or not 0 <= number <= most:
            raise DataError(f"{what}: expected integers of 0 to {most}, found {number!r:.80}")
    return tuple(value)
