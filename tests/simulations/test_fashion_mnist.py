# SPDX-License-Identifier: Apache-2.0
import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from client_sdk.data.idx import IdxFormatError
from simulations.datasets.fashion_mnist import load_fashion_mnist


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    data = header + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten training images, number i filled with i and labelled i; four test images of 200."""
    numbers = np.arange(10, dtype=np.uint8)
    images = np.broadcast_to(numbers[:, None, None], (10, 28, 28))
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", numbers)
    write_idx(tmp_path / "t10k-images-idx3-ubyte", np.full((4, 28, 28), 200, np.uint8))
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.array([3, 2, 1, 0], np.uint8))
    return tmp_path


def test_halves_are_disjoint_and_complete_and_private_comes_first(folder: Path) -> None:
    private, private_labels = load_fashion_mnist(folder, split="private")
    public, public_labels = load_fashion_mnist(folder, split="public")
    assert private[:, 0, 0].tolist() == private_labels.tolist() == [0, 1, 2, 3, 4]
    assert public[:, 0, 0].tolist() == public_labels.tolist() == [5, 6, 7, 8, 9]
    assert private.shape == (5, 28, 28)
    assert (private.dtype, private_labels.dtype) == (np.uint8, np.int64)


def test_test_split_is_read_when_files_are_plain(folder: Path) -> None:
    images, labels = load_fashion_mnist(folder, split="test")
    assert images.shape == (4, 28, 28)
    assert (images == 200).all()
    assert labels.tolist() == [3, 2, 1, 0]


def test_private_half_is_given_when_nothing_is_said(folder: Path) -> None:
    np.testing.assert_array_equal(
        load_fashion_mnist(folder)[1], load_fashion_mnist(folder, split="private")[1]
    )


def test_error_names_the_package_when_a_file_is_missing(folder: Path) -> None:
    (folder / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        load_fashion_mnist(folder, split="public")


def test_error_lists_the_splits_when_unknown(folder: Path) -> None:
    with pytest.raises(ValueError, match="'public', 'private', 'test'"):
        load_fashion_mnist(folder, split="train")


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("images-idx3", np.zeros((10, 28, 27), np.uint8), r"28, 28\], found uint8 \[10, 28, 27\]"),
        ("images-idx3", np.zeros((11, 28, 28), np.uint8), "each of 11 images"),
        ("labels-idx1", np.zeros(9, np.uint8), "each of 10 images"),
        ("labels-idx1", np.full(10, 10, np.uint8), "labels 0 to 9, found 10"),
    ],
)
def test_error_names_what_was_expected_when_arrays_disagree(
    folder: Path, name: str, array: np.ndarray, message: str
) -> None:
    write_idx(folder / f"train-{name}-ubyte.gz", array)
    with pytest.raises(IdxFormatError, match=message):
        load_fashion_mnist(folder, split="private")
