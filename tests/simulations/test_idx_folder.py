# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from simulations.datasets.loading import load_dataset
from simulations.errors import DataError

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def idx_bytes(array: np.ndarray) -> bytes:
    shape = np.array(array.shape, dtype=">u4").tobytes()
    return bytes([0, 0, 8, array.ndim]) + shape + array.astype(np.uint8).tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    arrays = (
        rng.integers(0, 256, (9, 5, 6)),
        np.arange(9) % 3,
        rng.integers(0, 256, (4, 5, 6)),
        np.array([2, 1, 0, 0]),
    )
    for name, array in zip(FILES, arrays, strict=True):
        (tmp_path / name).write_bytes(idx_bytes(array))
    return tmp_path


def test_idx_folder_loads_plain_and_gzip_files_alike(folder: Path) -> None:
    plain = load_dataset(folder, seed=0)
    assert plain.train["images"].shape == (9, 5, 6)
    assert plain.test["labels"].tolist() == [2, 1, 0, 0]
    assert plain.class_names == ("0", "1", "2")
    for name in FILES[:2]:
        (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
        (folder / name).unlink()
    packed = load_dataset(folder, seed=0)
    assert packed.train["images"].tobytes() == plain.train["images"].tobytes()


def test_idx_folder_takes_class_names_from_a_file(folder: Path) -> None:
    (folder / "classes.txt").write_text("cat\ndog\nowl\nnewt\n")
    assert load_dataset(folder, seed=0).class_names == ("cat", "dog", "owl", "newt")
    (folder / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(DataError, match=r"train-labels.*labels 0 to 1, found 2 at example 2"):
        load_dataset(folder, seed=0)
    (folder / "classes.txt").write_text("cat\ncat\n")
    with pytest.raises(DataError, match=r"classes\.txt: expected one class name a line"):
        load_dataset(folder, seed=0)
    (folder / "classes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"classes\.txt: expected UTF-8"):
        load_dataset(folder, seed=0)


@pytest.mark.parametrize(
    ("file", "array", "said"),
    [
        (FILES[3], np.array([0, 1, 2, 3]), "labels 0 to 2, found 3 at example 3"),
        (FILES[1], np.arange(8) % 3, "expected 9 labels, .* found 8"),
        (FILES[0], np.zeros((0, 5, 6)), "expected at least one image, found none"),
        (FILES[0], np.zeros((9, 30)), r"images \[n, height, width\], found uint8 \(9, 30\)"),
        (FILES[1], np.zeros((9, 1)), r"labels \[n\], found uint8 \(9, 1\)"),
        (FILES[2], np.zeros((4, 5, 5)), "shaped like the training arrays"),
    ],
)
def test_idx_folder_is_refused_when_files_disagree(
    folder: Path, file: str, array: np.ndarray, said: str
) -> None:
    (folder / file).write_bytes(idx_bytes(array))
    with pytest.raises(DataError, match=said):
        load_dataset(folder, seed=0)


@pytest.mark.parametrize("file", FILES)
def test_idx_folder_is_refused_when_a_file_is_missing_or_truncated(folder: Path, file: str) -> None:
    whole = (folder / file).read_bytes()
    for kept in (0, 3, 6, len(whole) - 1):
        (folder / file).write_bytes(whole[:kept])
        with pytest.raises(DataError, match=file):
            load_dataset(folder, seed=0)
    (folder / file).unlink()
    with pytest.raises(DataError, match=f"expected {file} or {file}.gz, found neither"):
        load_dataset(folder, seed=0)
