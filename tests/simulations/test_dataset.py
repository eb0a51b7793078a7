# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulations.datasets import fashion_mnist
from simulations.datasets.dataset import Dataset, stratified_split
from simulations.datasets.loading import load_dataset
from simulations.errors import DataError


def images(n: int, **changes: object) -> dict[str, np.ndarray]:
    arrays = {
        "images": np.zeros((n, 4, 4), np.uint8),
        "labels": np.arange(n, dtype=np.int64) % 2,
    }
    return {**arrays, **changes}  # type: ignore[dict-item]


def dataset(**changes: object) -> Dataset:
    fields = {
        "name": "toy",
        "kind": "image",
        "train": images(6),
        "test": images(4),
        "class_names": ("a", "b"),
    }
    return Dataset(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": {"images": np.zeros((2, 4, 4), np.uint8)}}, 'expected "labels" as int64'),
        ({"train": images(2, labels=np.zeros(2, np.int32))}, 'expected "labels" as int64'),
        ({"test": images(0)}, "toy, test: expected at least one example, found none"),
        ({"train": images(3, labels=np.array([0, 1, 2]))}, "labels 0 to 1 .* found 2 at example 2"),
        ({"train": images(3, labels=np.array([0, -1, 1]))}, "found -1 at example 1"),
        ({"train": images(3, labels=np.array([0, 1]))}, 'expected 2 rows in "images"'),
        ({"train": images(2, images=np.zeros((2, 4, 4)))}, "as uint8"),
        ({"train": images(2, images=np.zeros((2, 4, 4, 2), np.uint8))}, "1 or 3"),
        ({"train": images(2, images=np.zeros((2, 0, 4), np.uint8))}, "as uint8"),
        ({"test": images(2, images=np.zeros((2, 5, 5), np.uint8))}, "shaped like the training"),
        ({"groups": np.array(["x"])}, "one group for each of 6"),
        ({"kind": "text"}, 'expected "texts"'),
        ({"kind": "sound"}, 'kind "image" or "text", found "sound"'),
    ],
)
def test_dataset_is_refused_when_arrays_contradict_it(
    changes: dict[str, object], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        dataset(**changes)


@given(
    labels=st.lists(st.integers(0, 4), min_size=2, max_size=60),
    fraction=st.floats(0.05, 0.95),
    seed=st.integers(0, 2**32),
)
def test_stratified_split_is_disjoint_and_complete(
    labels: list[int], fraction: float, seed: int
) -> None:
    column = np.array(labels, dtype=np.int64)
    train, test = stratified_split(column, fraction, np.random.default_rng(seed))
    assert sorted([*train, *test]) == list(range(len(column)))
    for label in np.unique(column):
        size = int((column == label).sum())
        held = int((column[test] == label).sum())
        assert held <= size - 1
        assert size == 1 or abs(held - size * fraction) <= 1


def test_load_dataset_keeps_the_asked_number_when_limited() -> None:
    whole = load_dataset("digits", seed=0)
    small = load_dataset("digits", seed=0, max_train=100, max_test=30)
    again = load_dataset("digits", seed=0, max_train=100, max_test=30)
    other = load_dataset("digits", seed=1, max_train=100, max_test=30)
    assert len(small.train["labels"]) == 100 and len(small.test["labels"]) == 30
    assert small.train["images"].tobytes() == again.train["images"].tobytes()
    assert small.train["images"].tobytes() != other.train["images"].tobytes()
    beyond = load_dataset("digits", seed=0, max_train=10**6)
    assert len(beyond.train["labels"]) == len(whole.train["labels"])
    with pytest.raises(DataError, match="at least 0"):
        load_dataset("digits", seed=0, max_train=-1)


def test_load_dataset_lists_the_known_when_the_name_is_unknown(tmp_path) -> None:
    with pytest.raises(DataError, match="digits, fashion-mnist, debian-descriptions, or an exist"):
        load_dataset("mnsit", seed=0)
    with pytest.raises(DataError, match="found nothing"):
        load_dataset(tmp_path, seed=0)
    (tmp_path / "readme.txt").write_text("hello")
    with pytest.raises(DataError, match=r"found readme\.txt"):
        load_dataset(str(tmp_path), seed=0)


def test_fashion_mnist_names_the_package_when_it_is_missing(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path)
    with pytest.raises(DataError, match="apt-get install dataset-fashion-mnist"):
        load_dataset("fashion-mnist", seed=0)


def write_idx(path, array: np.ndarray) -> None:
    shape = np.array(array.shape, dtype=">u4").tobytes()
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + shape + array.astype(np.uint8).tobytes())


def test_fashion_mnist_is_the_private_half_when_loaded_by_name(tmp_path, monkeypatch) -> None:
    rng = np.random.default_rng(0)
    train = rng.integers(0, 256, (20, 28, 28))
    write_idx(tmp_path / "train-images-idx3-ubyte", train)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.arange(20) % 10)
    write_idx(tmp_path / "t10k-images-idx3-ubyte", rng.integers(0, 256, (10, 28, 28)))
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.arange(10))
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path)
    loaded = load_dataset("fashion-mnist", seed=0)
    assert np.array_equal(loaded.train["images"], train[:10])
    assert len(loaded.test["labels"]) == 10
    assert loaded.class_names[7] == "Sneaker"
