# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from client_sdk.data import jsonl
from simulations.datasets.loading import load_dataset
from simulations.errors import DataError


def write(file: Path, *records: object) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def test_jsonl_folder_uses_train_and_test_files(tmp_path: Path) -> None:
    write(
        tmp_path / "train.jsonl",
        {"text": "früh", "label": "b", "client": "x", "id": 3},
        {"text": "late", "label": "a", "client": 7},
    )
    write(tmp_path / "test.jsonl", {"text": "noon", "label": "b"})
    loaded = load_dataset(tmp_path, seed=0)
    assert loaded.kind == "text"
    assert loaded.train["texts"].tolist() == ["früh", "late"]
    assert loaded.train["labels"].tolist() == [1, 0]
    assert loaded.test["labels"].tolist() == [1]
    assert loaded.class_names == ("a", "b")
    assert loaded.groups is not None and loaded.groups.tolist() == ["x", "7"]


def test_jsonl_folder_holds_out_a_fifth_when_it_has_no_test_file(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", *({"text": f"a{i}", "label": 10} for i in range(10)))
    write(tmp_path / "b.jsonl", *({"text": f"b{i}", "label": 9} for i in range(5)))
    loaded = load_dataset(tmp_path, seed=0)
    assert loaded.class_names == ("9", "10")
    assert np.bincount(loaded.test["labels"]).tolist() == [1, 2]
    assert all(
        (text[0] == "a") == label
        for text, label in zip(loaded.train["texts"], loaded.train["labels"], strict=True)
    )
    assert loaded.groups is None


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "one JSON object"),
        (b'{"text": "\xff", "label": 1}', "UTF-8"),
        (b"[" * 100_000, "one JSON object"),
        (b"[1]", "expected a JSON object, found list"),
        (b'{"label": 1}', "expected the key \"text\", found 'label'"),
        (b'{"text": "x"}', 'expected the key "label"'),
        (b'{"text": " ", "label": 1}', '"text" as a string with content'),
        (b'{"text": 5, "label": 1}', '"text" as a string with content, found 5'),
        (b'{"text": "x", "label": 1.5}', '"label" as a string or an integer, found 1.5'),
        (b'{"text": "x", "label": true}', '"label" as a string or an integer, found True'),
        (b'{"text": "x", "label": "1"}', "label of type int as at .*train.jsonl:1, found '1'"),
        (b'{"text": "x", "label": 1, "client": [1]}', '"client" as a string or integer'),
        (b'{"text": "x", "label": 1, "client": "a\\nb"}', "printable characters"),
        (b'{"text": "x", "label": 1, "client": "c"}', '"client" on every training line'),
    ],
)
def test_jsonl_folder_names_file_and_line_when_a_line_is_bad(
    tmp_path: Path, line: bytes, said: str
) -> None:
    (tmp_path / "train.jsonl").write_bytes(b'{"text": "fine", "label": 1}\n\n' + line + b"\n")
    write(tmp_path / "test.jsonl", {"text": "noon", "label": 1})
    with pytest.raises(DataError, match=said) as caught:
        load_dataset(tmp_path, seed=0)
    at_fault = 1 if "every training line" in said else 3  # there line 1 lacks the client
    assert f"train.jsonl:{at_fault}:" in str(caught.value)


def test_jsonl_folder_is_refused_when_a_test_label_is_new(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", {"text": "x", "label": "a"})
    write(tmp_path / "test.jsonl", {"text": "x", "label": "a"}, {"text": "x", "label": "b"})
    with pytest.raises(DataError, match=r"test\.jsonl:2: .*\(a\), found 'b'"):
        load_dataset(tmp_path, seed=0)


def test_jsonl_folder_is_refused_when_files_do_not_fit(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", {"text": "x", "label": "a"})
    with pytest.raises(DataError, match=r"expected train\.jsonl beside test\.jsonl"):
        load_dataset(tmp_path, seed=0)
    (tmp_path / "train.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"train\.jsonl: expected at least one line, found none"):
        load_dataset(tmp_path, seed=0)


def test_jsonl_folder_is_refused_when_a_line_is_too_long(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 40)
    write(tmp_path / "all.jsonl", {"text": "x", "label": "a"}, {"text": "x" * 40, "label": "a"})
    with pytest.raises(DataError, match=r"all\.jsonl:2: expected at most 40 bytes"):
        load_dataset(tmp_path, seed=0)
