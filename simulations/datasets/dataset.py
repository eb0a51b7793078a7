# SPDX-License-Identifier: Apache-2.0
"""A data set as named arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from simulations.errors import DataError

Arrays = Mapping[str, np.ndarray]

TEXT_KEYS = frozenset({"texts"})
TOKEN_KEYS = frozenset({"input_ids", "attention_mask"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Raw examples, before a model's preprocessing.

    Shapes: "labels" int64 [n]; images "images" uint8 [n, h, w] or [n, h, w, 1 or 3];
    texts "texts" object [n] of str, after `tokenise` "input_ids" and "attention_mask" int64 [n, t].
    `groups` [n_train] names who each training example came from, for the natural partition.

    Raises: DataError when the arrays contradict this.
    """

    name: str
    kind: Literal["image", "text"]
    train: Arrays
    test: Arrays
    class_names: tuple[str, ...]
    groups: np.ndarray | None = None

    def __post_init__(self) -> None:
        for part, arrays in (("train", self.train), ("test", self.test)):
            _check_part(f"{self.name}, {part}", self.kind, arrays, len(self.class_names))
        expected = {key: array.shape[1:] for key, array in self.train.items()}
        found = {key: array.shape[1:] for key, array in self.test.items()}
        if expected != found:
            raise DataError(
                f"{self.name}: expected test arrays shaped like the training arrays "
                f"{expected}, found {found}"
            )
        samples = len(self.train["labels"])
        if self.groups is not None and self.groups.shape != (samples,):
            raise DataError(
                f"{self.name}: expected one group for each of {samples} training examples, "
                f"found groups of shape {self.groups.shape}"
            )


def _check_part(where: str, kind: str, arrays: Arrays, classes: int) -> None:
    labels = arrays.get("labels")
    if labels is None or labels.ndim != 1 or labels.dtype != np.int64:
        raise DataError(f'{where}: expected "labels" as int64 [n]')
    if len(labels) == 0:
        raise DataError(f"{where}: expected at least one example, found none")
    if labels.min() < 0 or labels.max() >= classes:
        bad = int(np.flatnonzero((labels < 0) | (labels >= classes))[0])
        raise DataError(
            f"{where}: expected labels 0 to {classes - 1} for {classes} classes, "
            f"found {labels[bad]} at example {bad}"
        )
    for key, array in arrays.items():
        if array.ndim == 0 or len(array) != len(labels):
            raise DataError(
                f'{where}: expected {len(labels)} rows in "{key}", one a label, '
                f"found shape {array.shape}"
            )
    inputs = set(arrays) - {"labels"}
    if kind == "image":
        images = arrays.get("images")
        if (
            inputs != {"images"}
            or images is None
            or images.dtype != np.uint8
            or not (images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3)))
            or 0 in images.shape[1:3]
        ):
            raise DataError(
                f'{where}: expected "images" as uint8 [n, height, width] or [n, height, width, '
                f"1 or 3], found {_described(arrays)}"
            )
    elif kind == "text":
        if inputs not in (TEXT_KEYS, TOKEN_KEYS):
            raise DataError(
                f'{where}: expected "texts", or "input_ids" and "attention_mask", '
                f"found {_described(arrays)}"
            )
    else:
        raise DataError(f'{where}: expected kind "image" or "text", found "{kind}"')


def _described(arrays: Arrays) -> str:
    return ", ".join(f'"{key}" {array.dtype} {array.shape}' for key, array in arrays.items())


def take(arrays: Arrays, indices: np.ndarray) -> dict[str, np.ndarray]:
    """The rows `indices` of every array, copied."""
    return {key: array[indices] for key, array in arrays.items()}


def stratified_split(
    labels: np.ndarray, fraction: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Splits each class apart, so that the test part has the classes in the same proportions.

    Returns: sorted indices (train, test); a class of one example stays in train, a larger one
    gives at least one to each part.
    """
    test: list[np.ndarray] = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        count = min(max(1, round(len(members) * fraction)), len(members) - 1)
        test.append(members[:count])
    held = np.sort(np.concatenate(test))
    return np.setdiff1d(np.arange(len(labels)), held), held
