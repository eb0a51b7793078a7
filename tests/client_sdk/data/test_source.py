# SPDX-License-Identifier: Apache-2.0
"""A device's own data by one address: real files, opened as a device opens them."""

from __future__ import annotations

import gzip
import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from client_sdk.data import open_source
from client_sdk.errors import DataError


def write_image(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    data = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_lines(path: Path, *records: object) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


# Image folders


def test_image_folder_gives_class_names_and_a_block_for_each_size(tmp_path: Path) -> None:
    for number in range(3):
        write_image(tmp_path / "dog" / f"{number}.png", np.full((4, 5), number, np.uint8))
    write_image(tmp_path / "cat" / "large.jpg", np.full((8, 8), 200, np.uint8))
    write_image(tmp_path / "cat" / "colour.png", np.full((4, 5, 3), 9, np.uint8))
    (tmp_path / ".thumbnails").mkdir()
    own = open_source(str(tmp_path))
    assert own.held_out == ()
    found = [(block["images"].shape, block["labels"].tolist()) for block in own.fit]
    assert found == [
        ((1, 4, 5, 3), ["cat"]),
        ((1, 8, 8), ["cat"]),
        ((3, 4, 5), ["dog", "dog", "dog"]),
    ]
    assert own.fit[2]["images"][:, 0, 0].tolist() == [0, 1, 2]


def test_image_folder_with_train_and_test_holds_the_second_out(tmp_path: Path) -> None:
    write_image(tmp_path / "train" / "a" / "x.png", np.zeros((4, 4), np.uint8))
    own = open_source(str(tmp_path))
    assert own.held_out == ()
    write_image(tmp_path / "test" / "b" / "y.png", np.zeros((4, 4), np.uint8))
    own = open_source(str(tmp_path))
    assert own.fit[0]["labels"].tolist() == ["a"]
    assert own.held_out[0]["labels"].tolist() == ["b"]
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match='perhaps "test" with such in them; found other, test'):
        open_source(str(tmp_path))


def test_image_folder_is_refused_when_a_file_is_no_image(tmp_path: Path) -> None:
    write_image(tmp_path / "a" / "x.png", np.zeros((4, 4), np.uint8))
    (tmp_path / "a" / "y.png").write_bytes(b"not one")
    with pytest.raises(DataError, match=r"y\.png: expected a whole PNG or JPEG"):
        open_source(str(tmp_path))


# IDX


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_pairs_are_read_and_those_named_t10k_are_held_out(tmp_path: Path, suffix: str) -> None:
    images = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    write_idx(tmp_path / f"train-images-idx3-ubyte{suffix}", images)
    write_idx(tmp_path / f"train-labels-idx1-ubyte{suffix}", np.array([1, 0]))
    own = open_source(str(tmp_path))
    assert own.held_out == ()
    np.testing.assert_array_equal(own.fit[0]["images"], images)
    assert own.fit[0]["labels"].dtype == np.int64 and own.fit[0]["labels"].tolist() == [1, 0]
    write_idx(tmp_path / f"t10k-images-idx3-ubyte{suffix}", images[:1])
    with pytest.raises(DataError, match="expected t10k-labels-idx1-ubyte"):
        open_source(str(tmp_path))
    write_idx(tmp_path / f"t10k-labels-idx1-ubyte{suffix}", np.array([3]))
    assert open_source(str(tmp_path)).held_out[0]["labels"].tolist() == [3]


def test_idx_labels_become_names_when_the_folder_has_them(tmp_path: Path) -> None:
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros((3, 2, 2)))
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.array([1, 0, 1]))
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    assert open_source(str(tmp_path)).fit[0]["labels"].tolist() == ["dog", "cat", "dog"]
    (tmp_path / "classes.txt").write_text("cat\n")
    with pytest.raises(DataError, match="expected labels 0 to 0, found 1 at example 0"):
        open_source(str(tmp_path))


# npz


def test_npz_gives_its_arrays_by_name(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "own.npz", images=np.zeros((2, 3, 3), np.uint8), labels=np.array(["a", "b"])
    )
    (block,) = open_source(str(tmp_path / "own.npz")).fit
    assert block.keys() == {"images", "labels"} and block["labels"].tolist() == ["a", "b"]
    folder = tmp_path / "both"
    folder.mkdir()
    np.savez(folder / "train.npz", x=np.zeros(2), labels=np.arange(2))
    assert open_source(str(folder)).held_out == ()
    np.savez(folder / "test.npz", x=np.zeros(1), labels=np.arange(1))
    assert len(open_source(str(folder)).held_out[0]["labels"]) == 1


def test_npz_is_refused_when_it_holds_a_pickle_or_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    np.savez(path, allow_pickle=True, labels=np.array([{}], object))
    with pytest.raises(DataError, match=r"own\.npz: expected a numpy file of numbers"):
        open_source(str(path))
    np.savez_compressed(path, labels=np.random.default_rng(0).integers(0, 9, 500))
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    for _ in range(60):
        broken = bytearray(whole[: rng.integers(1, len(whole) + 1)])
        broken[rng.integers(len(broken))] ^= 0xFF
        path.write_bytes(broken)
        try:
            open_source(str(path))
        except DataError:
            continue
    path.write_bytes(np.arange(3).tobytes())
    with pytest.raises(DataError, match="expected a numpy file"):
        open_source(str(path))
    with path.open("wb") as file:
        np.save(file, np.arange(3))
    with pytest.raises(DataError, match=r"found one array; name it \.npy"):
        open_source(str(path))


# jsonl


def test_jsonl_gives_texts_with_labels_of_either_type(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    write_lines(file, {"text": "früh", "label": "b"}, {"text": "late", "label": "a", "more": 1})
    (block,) = open_source(str(file)).fit
    assert block["texts"].tolist() == ["früh", "late"] and block["labels"].tolist() == ["b", "a"]
    write_lines(file, {"text": "x", "label": 10}, {"text": "y", "label": 9})
    assert open_source(str(file)).fit[0]["labels"].dtype == np.int64


def test_jsonl_gives_ready_tokens_padded_to_the_longest(tmp_path: Path) -> None:
    write_lines(
        tmp_path / "train.jsonl",
        {"input_ids": [5, 6, 7], "label": 1},
        {"input_ids": [8, 0], "attention_mask": [1, 0], "label": 0, "text": "not looked at"},
    )
    write_lines(tmp_path / "test.jsonl", {"input_ids": [9], "label": 1})
    own = open_source(str(tmp_path))
    assert own.fit[0]["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert own.fit[0]["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert own.held_out[0]["input_ids"].tolist() == [[9]]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"input_ids": [], "label": 1}, "a list of 1 to"),
        ({"input_ids": "5", "label": 1}, "a list of 1 to"),
        ({"input_ids": [1, True], "label": 1}, "integers of 0 to 2147483647, found True"),
        ({"input_ids": [1, -1], "label": 1}, "found -1"),
        ({"input_ids": [1, 2.0], "label": 1}, "found 2.0"),
        ({"input_ids": [1 << 40], "label": 1}, "found 1099511627776"),
        ({"input_ids": [1], "attention_mask": [2], "label": 1}, "integers of 0 to 1, found 2"),
        ({"input_ids": [1], "attention_mask": [1, 1], "label": 1}, "of 1 values, one for each"),
        ({"input_ids": [1]}, 'expected the key "label"'),
        ({"label": 1}, 'expected the key "text"'),
        ({"text": "x", "label": 1}, 'expected "input_ids" as on the lines before it'),
        ({"input_ids": [1], "label": "a"}, "label of type int"),
        ({"input_ids": [1], "label": 1 << 70}, 'expected "label" within 64 bits'),
    ],
)
def test_jsonl_names_the_line_when_it_is_bad(tmp_path: Path, line: object, words: str) -> None:
    write_lines(tmp_path / "own.jsonl", {"input_ids": [1], "label": 1}, line)
    with pytest.raises(DataError, match=words) as caught:
        open_source(str(tmp_path / "own.jsonl"))
    assert "own.jsonl:2:" in str(caught.value)


# Own code, and what is none of these


def test_own_function_gives_its_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import numpy as np\ndef load():\n    return {'x': np.ones(2), 'labels': np.arange(2)}\n"
    (tmp_path / "camera_of_test.py").write_text(code)
    (block,) = open_source(f"{tmp_path / 'camera_of_test.py'}:load").fit
    assert block["x"].tolist() == [1, 1]
    monkeypatch.syspath_prepend(tmp_path)
    assert open_source("camera_of_test:load").fit[0].keys() == {"x", "labels"}
    del sys.modules["camera_of_test"]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def load():\n    raise OSError('no camera')", "it raised OSError: no camera"),
        ("def load():\n    return [1]", "expected a dict of numpy arrays .* found a list"),
        ("def load():\n    return {1: 2}", "expected a dict of numpy arrays"),
        ("def other():\n    pass", "expected a function load"),
    ],
)
def test_own_function_is_refused_when_it_gives_no_arrays(
    tmp_path: Path, code: str, words: str
) -> None:
    (tmp_path / "own.py").write_text(code)
    with pytest.raises(DataError, match=words):
        open_source(f"{tmp_path / 'own.py'}:load")


def test_address_is_refused_when_nothing_is_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder; expected a folder of images"):
        open_source(str(tmp_path / "absent"))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"found notes\.txt"):
        open_source(str(tmp_path))
    with pytest.raises(DataError, match=r"found a file \.txt"):
        open_source(str(tmp_path / "notes.txt"))
    with pytest.raises(DataError, match=r"\.jsonl: expected at least one line, found none"):
        (tmp_path / "a.jsonl").write_text("")
        open_source(str(tmp_path / "a.jsonl"))
