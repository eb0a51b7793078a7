# SPDX-License-Identifier: Apache-2.0
"""From a data set's texts to token ids, with the tokenizer of the backbone's folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from client_sdk.data.tokens import encode, open_tokenizer
from client_sdk.errors import DataError as SourceError
from simulations.datasets.dataset import Dataset
from simulations.errors import DataError


def tokenise(dataset: Dataset, backbone_folder: str | Path, max_length: int) -> Dataset:
    """Replaces "texts" by "input_ids" and "attention_mask", int64 [n, max_length], padded right.

    Raises: DataError for a data set without texts, or a folder without a usable tokenizer.
    """
    if "texts" not in dataset.train:
        raise DataError(
            f'{dataset.name}: expected a text data set with "texts", found '
            f"{', '.join(dataset.train)}"
        )
    try:
        tokenizer = open_tokenizer(Path(backbone_folder), max_length)
    except SourceError as error:
        raise DataError(str(error)) from error
    parts = [
        {**encode(tokenizer, arrays["texts"]), "labels": arrays["labels"]}
        for arrays in (dataset.train, dataset.test)
    ]
    return replace(dataset, train=parts[0], test=parts[1])
