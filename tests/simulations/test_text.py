# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from simulations.datasets.dataset import Dataset
from simulations.datasets.loading import load_dataset
from simulations.datasets.text import tokenise
from simulations.errors import DataError

WORDS = ("[UNK]", "[PAD]", "[CLS]", "[SEP]", "red", "green", "blue")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    # Baked-in settings of another length, as in the MiniLM folder, must not win.
    tokenizer.enable_truncation(128)
    tokenizer.enable_padding(length=128)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]"}))
    return tmp_path


@pytest.fixture
def texts() -> Dataset:
    def part(*lines: str) -> dict[str, np.ndarray]:
        return {
            "texts": np.array(lines, dtype=object),
            "labels": np.zeros(len(lines), dtype=np.int64),
        }

    return Dataset(
        name="colours",
        kind="text",
        train=part("red green", "blue blue blue blue blue"),
        test=part("mauve"),
        class_names=("only",),
        groups=np.array(["a", "b"]),
    )


def test_tokenise_pads_and_truncates_to_max_length(folder: Path, texts: Dataset) -> None:
    done = tokenise(texts, folder, 5)
    assert done.train["input_ids"].tolist() == [[2, 4, 5, 3, 1], [2, 6, 6, 6, 3]]
    assert done.train["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert done.test["input_ids"].tolist() == [[2, 0, 3, 1, 1]]
    assert done.train["input_ids"].dtype == np.int64
    assert "texts" not in done.train and "texts" in texts.train
    assert done.groups is texts.groups


def test_tokenise_takes_the_pad_token_where_the_folder_has_it(folder: Path, texts: Dataset) -> None:
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({"pad_token": {"content": "[PAD]"}}))
    assert tokenise(texts, folder, 4).test["input_ids"].tolist() == [[2, 0, 3, 1]]
    config.unlink()  # then the padding settings of tokenizer.json, here of id 0
    assert tokenise(texts, folder, 4).test["input_ids"].tolist() == [[2, 0, 3, 0]]
    bare = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**bare, "padding": None}))
    assert tokenise(texts, folder, 4).test["attention_mask"].tolist() == [[1, 1, 1, 0]]


def test_tokenise_is_refused_when_the_folder_has_no_usable_tokenizer(
    folder: Path, texts: Dataset
) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<none>"}))
    with pytest.raises(DataError, match="pad token of the vocabulary, found '<none>'"):
        tokenise(texts, folder, 5)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: expected JSON"):
        tokenise(texts, folder, 5)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="expected a tokenizer of the tokenizers library"):
        tokenise(texts, folder, 5)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="write it once with transformers"):
        tokenise(texts, folder, 5)


def test_tokenise_is_refused_when_nothing_can_be_tokenised(folder: Path, texts: Dataset) -> None:
    with pytest.raises(DataError, match=r"more than the 2 special tokens .* found 2"):
        tokenise(texts, folder, 2)
    with pytest.raises(DataError, match='digits: expected a text data set with "texts"'):
        tokenise(load_dataset("digits", seed=0), folder, 5)
