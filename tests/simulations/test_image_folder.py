# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simulations.datasets.loading import load_dataset
from simulations.errors import DataError


def write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def grey(level: int, size: tuple[int, int] = (5, 6)) -> np.ndarray:
    return np.full(size, level, np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for label, name in enumerate(("cat", "dog")):
        for i in range(5):
            write(tmp_path / name / f"{i}.png", grey(100 * label + i))
    return tmp_path


def test_image_folder_holds_out_a_fifth_when_it_has_no_test_folder(folder: Path) -> None:
    loaded = load_dataset(folder, seed=0)
    assert loaded.class_names == ("cat", "dog")
    assert loaded.train["images"].shape == (8, 5, 6)
    assert loaded.test["labels"].tolist() == [0, 1]
    levels = np.concatenate([loaded.train["images"], loaded.test["images"]])[:, 0, 0]
    assert sorted(levels) == [0, 1, 2, 3, 4, 100, 101, 102, 103, 104]
    assert (loaded.train["images"][:, 0, 0] // 100 == loaded.train["labels"]).all()
    tests = {load_dataset(folder, seed=s).test["images"].tobytes() for s in range(8)}
    assert len(tests) > 1


def test_image_folder_uses_train_and_test_folders(tmp_path: Path) -> None:
    write(tmp_path / "train" / "a" / "x.png", grey(1))
    write(tmp_path / "train" / "b" / "x.jpg", grey(200))
    write(tmp_path / "test" / "b" / "y.jpeg", grey(200))
    loaded = load_dataset(tmp_path, seed=0)
    assert loaded.train["labels"].tolist() == [0, 1]
    assert loaded.test["labels"].tolist() == [1]
    assert loaded.test["images"][0, 0, 0] == 200
    write(tmp_path / "test" / "c" / "z.png", grey(1))
    with pytest.raises(DataError, match=r"test.c: expected a class .*\(a, b\), found c"):
        load_dataset(tmp_path, seed=0)
    write(tmp_path / "other" / "z.png", grey(1))
    with pytest.raises(DataError, match='"train" and "test" together'):
        load_dataset(tmp_path, seed=0)


def test_image_folder_becomes_colour_when_one_image_is(folder: Path) -> None:
    colour = np.zeros((5, 6, 3), np.uint8)
    colour[..., 2] = 250
    write(folder / "dog" / "5.png", colour)
    loaded = load_dataset(folder, seed=0)
    together = np.concatenate([loaded.train["images"], loaded.test["images"]])
    assert together.shape == (11, 5, 6, 3)
    blue = (together[:, 0, 0] == [0, 0, 250]).all(axis=1)
    assert blue.sum() == 1
    assert (together[~blue][..., 0] == together[~blue][..., 2]).all()


def test_image_folder_is_refused_when_sizes_differ(folder: Path) -> None:
    write(folder / "dog" / "9.png", grey(1, (7, 8)))
    with pytest.raises(DataError, match=r"9\.png: expected 6×5 pixels .* found 8×7"):
        load_dataset(folder, seed=0)


def test_image_folder_is_refused_when_a_file_is_no_image(folder: Path) -> None:
    file = folder / "dog" / "9.png"
    write(file, np.random.default_rng(0).integers(0, 256, (5, 6), np.uint8))
    whole = file.read_bytes()
    for broken in (b"", b"not an image", whole[: len(whole) // 2]):
        file.write_bytes(broken)
        with pytest.raises(DataError, match=r"9\.png: expected a whole PNG or JPEG"):
            load_dataset(folder, seed=0)
    file.rename(folder / "dog" / "9.bmp")
    with pytest.raises(DataError, match=r"9\.bmp: expected a PNG or JPEG file"):
        load_dataset(folder, seed=0)


def test_image_folder_is_refused_when_16_bits_a_channel(folder: Path) -> None:
    write(folder / "cat" / "0.png", np.full((5, 6), 40000, np.uint16))
    with pytest.raises(DataError, match="expected 8 bits a channel"):
        load_dataset(folder, seed=0)


def test_image_folder_is_refused_when_a_class_is_empty(folder: Path) -> None:
    (folder / "newt").mkdir()
    (folder / ".cache").mkdir()
    with pytest.raises(DataError, match="newt: expected at least one image, found an empty"):
        load_dataset(folder, seed=0)
