# SPDX-License-Identifier: Apache-2.0
"""A device's own data against a bundle's manifest, and from there to model inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from client_sdk.data.held_out import held_out_rows
from client_sdk.data.labels import class_numbers, label_faults
from client_sdk.data.source import Arrays, OwnData
from client_sdk.data.tokens import encode, open_tokenizer
from client_sdk.errors import DataError
from edge_runtime.preprocessing import apply
from edge_runtime.preprocessing import faults as preprocessing_faults
from edge_runtime.trainer import check_data, input_faults
from protocol.manifest import Manifest

_RAW = {"image": ("images",), "tokens": ("input_ids", "attention_mask")}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelData:
    """Model inputs and "labels" int64 [n], to train on and held out ({} where nothing is)."""

    fit: Mapping[str, np.ndarray]
    held_out: Mapping[str, np.ndarray] = field(default_factory=dict)


def prepare(
    manifest: Manifest,
    own: OwnData,
    *,
    least_samples: int = 1,
    held_out: float = 0.0,
    tokenizer: Path | None = None,
) -> ModelData:
    """What `own` is to the bundle of this manifest.

    At least `least_samples` must be left to train on. The share `held_out` (0 to below 1) is kept
    apart, chosen by the samples' contents; where the source keeps some apart itself, those are
    taken instead. Texts become tokens by the tokenizer.json in the folder `tokenizer`.

    Raises: DataError, one that lists every fault: what was expected, what came and what to do.
    """
    if not 0 <= held_out < 1:
        raise DataError(f"held_out: expected a share of 0 to below 1, found {held_out:g}")
    faults: list[str] = []
    if manifest.preprocessing.kind == "tokens" and _has_texts(own):
        own, faults = _tokenised(own, manifest.preprocessing.max_length, tokenizer)
    faults += _part_faults(manifest, own.fit)
    faults += [f"held-out data: {fault}" for fault in _part_faults(manifest, own.held_out)]
    if not faults:
        if held_out and not own.held_out:
            own = _parted(manifest, own, held_out)
        samples = sum(len(block["labels"]) for block in own.fit)
        if samples < least_samples:
            apart = sum(len(block["labels"]) for block in own.held_out)
            faults.append(
                f"data: expected at least {least_samples} samples to train on, found {samples}"
                + (f" beside {apart} held out" if apart else "")
                + "; collect more first"
            )
    if faults:
        raise DataError(*faults, about=f"{own.address} does not fit the bundle")
    return ModelData(fit=_inputs(manifest, own.fit), held_out=_inputs(manifest, own.held_out))


def _has_texts(own: OwnData) -> bool:
    return any(_is_text(block) for block in (*own.fit, *own.held_out))


def _is_text(block: Arrays) -> bool:
    return "texts" in block and "input_ids" not in block


def _tokenised(own: OwnData, max_length: int, folder: Path | None) -> tuple[OwnData, list[str]]:
    """The data with the tokens of their texts beside them, or as they are and why."""
    if folder is None:
        return own, [
            "texts: expected tokens, and the bundle brings no tokenizer; name the folder of the "
            'backbone\'s tokenizer.json, or give ready "input_ids" and "attention_mask"'
        ]
    for block in (*own.fit, *own.held_out):
        if _is_text(block) and not _are_texts(block["texts"]):
            return own, ['"texts": expected strings with content, one a sample']
    try:
        tokens = open_tokenizer(folder, max_length)
    except DataError as error:
        return own, [str(error)]

    def with_tokens(blocks: tuple[Arrays, ...]) -> tuple[Arrays, ...]:
        return tuple(
            {**block, **encode(tokens, block["texts"])} if _is_text(block) else block
            for block in blocks
        )

    return replace(own, fit=with_tokens(own.fit), held_out=with_tokens(own.held_out)), []


def _are_texts(texts: object) -> bool:
    return (
        isinstance(texts, np.ndarray)
        and texts.ndim == 1
        and all(isinstance(text, str) and text.strip() for text in texts)
    )


def _part_faults(manifest: Manifest, blocks: Sequence[Arrays]) -> list[str]:
    """Every fault of a part's blocks, once each."""
    found = dict.fromkeys(fault for block in blocks for fault in _block_faults(manifest, block))
    labels = [block["labels"] for block in blocks if isinstance(block.get("labels"), np.ndarray)]
    if len(labels) > 1 and all(some.ndim == 1 for some in labels):
        labels = [np.concatenate(labels)]
    for some in labels:
        found |= dict.fromkeys(label_faults(some, manifest.class_names))
    return list(found)


def _block_faults(manifest: Manifest, block: Arrays) -> Iterator[str]:
    settings = manifest.preprocessing
    if "labels" not in block:
        names = ", ".join(sorted(block)) or "nothing"
        yield f'labels: expected an array "labels", one a sample, found {names}'
    if settings.kind == "tokens" and _is_text(block):
        return  # why there are no tokens has been said
    given = _relevant(manifest, block)
    if settings.kind == "array":
        yield from preprocessing_faults(settings, given)
        # What preprocessing makes of an array, for its shape and type alone.
        made = {
            name: np.broadcast_to(np.float32(0), array.shape) if array.dtype.kind == "f" else array
            for name, array in given.items()
            if isinstance(array, np.ndarray)
        }
        rows = max((len(array) for array in made.values() if array.ndim), default=0)
        yield from input_faults(manifest, made, rows)
    else:
        complete = given.keys() >= set(_RAW[settings.kind])
        yield from preprocessing_faults(settings, given if complete else block)


def _relevant(manifest: Manifest, block: Arrays) -> dict[str, np.ndarray]:
    """The arrays that the bundle has a use for, before preprocessing."""
    wanted = (*_RAW.get(manifest.preprocessing.kind, _input_names(manifest)), "labels")
    return {name: block[name] for name in wanted if name in block}


def _parted(manifest: Manifest, own: OwnData, share: float) -> OwnData:
    blocks = [_relevant(manifest, block) for block in own.fit]
    pairs = list(zip(blocks, held_out_rows(blocks, share), strict=True))
    return replace(
        own,
        fit=tuple(_rows(block, ~held) for block, held in pairs if not held.all()),
        held_out=tuple(_rows(block, held) for block, held in pairs if held.any()),
    )


def _rows(block: Arrays, chosen: np.ndarray) -> Arrays:
    return {name: array[chosen] for name, array in block.items()}


def _inputs(manifest: Manifest, blocks: Sequence[Arrays]) -> dict[str, np.ndarray]:
    parts = []
    for block in blocks:
        labels = class_numbers(block["labels"], manifest.class_names)
        raw = {**_relevant(manifest, block), "labels": labels}
        made = apply(manifest.preprocessing, raw)
        # Whatever else a source holds, such as a text, has no use from here on.
        parts.append({name: made[name] for name in (*_input_names(manifest), "labels")})
    if not parts:
        return {}
    data = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    check_data(manifest, data)
    return data


def _input_names(manifest: Manifest) -> tuple[str, ...]:
    return tuple(name for name, _ in manifest.inputs)
