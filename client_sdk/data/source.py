# SPDX-License-Identifier: Apache-2.0
"""A device's own data by one address, as the raw arrays that `edge_runtime.preprocess` takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np

from client_sdk.data import idx_folder, image_folder, jsonl
from client_sdk.data.folders import entries_of, kind_of_folder
from client_sdk.data.numpy_files import read_npz
from client_sdk.errors import DataError, FunctionError
from client_sdk.functions import load_function

Arrays = Mapping[str, np.ndarray]

FORMS: Final = (
    "a folder of images in a subfolder a class, of IDX files, of jsonl or with train.npz; "
    'a .npz or .jsonl file; or "module:function"'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnData:
    """Samples before preprocessing, in blocks whose samples have one shape.

    A block's arrays have a row a sample: "labels", integers or class names [n], beside "images"
    uint8 [n, h, w] or [n, h, w, c], or "texts" objects [n] of str, or "input_ids" and
    "attention_mask" integers [n, t], or whatever else the bundle reads, by its names.
    `held_out` is what the source itself sets apart, to be tested on; () for none.
    """

    address: str
    fit: tuple[Arrays, ...]
    held_out: tuple[Arrays, ...] = ()


def open_source(address: str) -> OwnData:
    """Reads the data behind an address, all of them.

    An image folder may have `train/` and `test/` with class subfolders in each; its images may have
    any sizes. IDX files are read in pairs, `train-…` and, if there, `t10k-…`. npz files hold arrays
    by name. A line of jsonl has "text" or "input_ids", and "label". A function is called without
    arguments and gives a dict of arrays.

    Raises: DataError with the file, what was expected and what was found.
    """
    path = Path(address).expanduser()
    try:
        if path.is_dir():
            return _open_folder(address, path)
        if path.is_file():
            return OwnData(address=address, fit=(_read_file(path),))
    except OSError as error:
        raise DataError(f"{address}: cannot be read: {error}") from error
    if ":" in address:
        return OwnData(address=address, fit=(_call(address),))
    raise DataError(f"{address}: no such file or folder; expected {FORMS}")


def _open_folder(address: str, folder: Path) -> OwnData:
    held_out: tuple[Arrays, ...] = ()
    match kind_of_folder(folder):
        case "idx":
            fit: tuple[Arrays, ...] = (_idx_part(folder, "train"),)
            if idx_folder.has_part(folder, "test"):
                held_out = (_idx_part(folder, "test"),)
        case "jsonl":
            train, test = jsonl.part_files(folder)
            fit = _jsonl_part(train)
            held_out = _jsonl_part(test) if test else ()
        case "npz":
            fit = (read_npz(folder / "train.npz"),)
            if (folder / "test.npz").exists():
                held_out = (read_npz(folder / "test.npz"),)
        case "images":
            folders = image_folder.subfolders(folder)
            if not {"train", "test"} & folders.keys():
                return OwnData(address=address, fit=_image_blocks(folder))
            if not {"train"} <= folders.keys() <= {"train", "test"}:
                raise DataError(
                    f'{folder}: expected a subfolder a class, or "train" and perhaps "test" with '
                    f"such in them; found {', '.join(folders)}"
                )
            fit = _image_blocks(folders["train"])
            held_out = _image_blocks(folders["test"]) if "test" in folders else ()
        case _:
            raise DataError(f"{folder}: expected {FORMS}; found {entries_of(folder)}")
    return OwnData(address=address, fit=fit, held_out=held_out)


def _idx_part(folder: Path, part: Literal["train", "test"]) -> Arrays:
    arrays, file = idx_folder.read_pair(folder, part)
    names = idx_folder.read_class_names(folder)
    if not names:
        return arrays
    idx_folder.check_labels(arrays["labels"], file, names)
    return {**arrays, "labels": jsonl.text_array(names)[arrays["labels"]]}


def _jsonl_part(files: Sequence[Path]) -> tuple[Arrays, ...]:
    records = [record for file in files for record in jsonl.read_records(file, tokens=True)]
    return (jsonl.arrays_of(records),)


def _image_blocks(folder: Path) -> tuple[Arrays, ...]:
    """A block for each size and number of channels, in the order in which they are met."""
    images: dict[tuple[int, ...], list[np.ndarray]] = {}
    labels: dict[tuple[int, ...], list[str]] = {}
    for name, _, image in image_folder.read_classes(folder):
        images.setdefault(image.shape, []).append(image)
        labels.setdefault(image.shape, []).append(name)
    return tuple(
        {"images": np.stack(some), "labels": jsonl.text_array(labels[shape])}
        for shape, some in images.items()
    )


def _read_file(path: Path) -> Arrays:
    match path.suffix.lower():
        case ".npz":
            return read_npz(path)
        case ".jsonl":
            return jsonl.arrays_of(list(jsonl.read_records(path, tokens=True)))
    raise DataError(f"{path}: expected {FORMS}; found a file {path.suffix or 'without a suffix'}")


def _call(address: str) -> Arrays:
    try:
        function = load_function(address)
    except FunctionError as error:
        raise DataError(f"{error}; or give {FORMS}") from error
    try:
        found = function()
    except Exception as error:  # it is the device's own code
        raise DataError(f"{address}: it raised {type(error).__name__}: {error}") from error
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise DataError(
            f'{address}: expected a dict of numpy arrays by name, with "labels"; found a '
            f"{type(found).__name__}"
        )
    return dict(found)
