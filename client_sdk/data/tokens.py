# SPDX-License-Identifier: Apache-2.0
"""From texts to token ids, with the tokenizer of a bundle or of a local Hugging Face model.

Uses the `tokenizers` library on the folder's tokenizer.json: the same ids as transformers'
AutoTokenizer gives, without importing transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from client_sdk.errors import DataError
from protocol.files import TOKENIZER_FILE, TOKENIZER_SETTINGS

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def open_tokenizer(folder: Path, max_length: int) -> Tokenizer:
    """The folder's tokenizer, made to pad right and to cut to `max_length`.

    Raises: DataError for a folder without a usable tokenizer, or too short a length.
    """
    tokenizer = _load_tokenizer(folder)
    special = tokenizer.num_special_tokens_to_add(False)
    if max_length <= special:
        raise DataError(
            f"max_length: expected more than the {special} special tokens that this tokenizer "
            f"adds, found {max_length}"
        )
    pad_id, pad_token = _padding(folder, tokenizer)
    tokenizer.enable_truncation(max_length)
    tokenizer.enable_padding(length=max_length, pad_id=pad_id, pad_token=pad_token)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: np.ndarray) -> dict[str, np.ndarray]:
    """ "input_ids" and "attention_mask" of texts [n], int64 [n, max_length]."""
    encodings = tokenizer.encode_batch(list(texts))
    return {
        "input_ids": np.array([e.ids for e in encodings], dtype=np.int64),
        "attention_mask": np.array([e.attention_mask for e in encodings], dtype=np.int64),
    }


def _load_tokenizer(folder: Path) -> Tokenizer:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise DataError(
            "texts: expected the tokenizers package; install it with: pip install tokenizers"
        ) from error
    file = folder / TOKENIZER_FILE
    if not file.is_file():
        raise DataError(
            f"{folder}: expected {TOKENIZER_FILE}, found none; write it once with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for a malformed file
        raise DataError(
            f"{file}: expected a tokenizer of the tokenizers library: {error}"
        ) from error


def _padding(folder: Path, tokenizer: Tokenizer) -> tuple[int, str]:
    """The pad token that the model was trained with; the mask hides it, so that a model without
    one (most decoders) may be padded with its token 0."""
    file = folder / TOKENIZER_SETTINGS
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise DataError(f"{file}: expected JSON in UTF-8, found {error}") from error
    token = config.get("pad_token") if isinstance(config, dict) else None
    if isinstance(token, dict):
        token = token.get("content")
    if isinstance(token, str):
        known = tokenizer.token_to_id(token)
        if known is None:
            raise DataError(
                f"{file}: expected a pad token of the vocabulary, found {token!r}, which "
                f"{TOKENIZER_FILE} does not have"
            )
        return known, token
    if tokenizer.padding is not None:
        return tokenizer.padding["pad_id"], tokenizer.padding["pad_token"]
    return 0, tokenizer.id_to_token(0) or ""
