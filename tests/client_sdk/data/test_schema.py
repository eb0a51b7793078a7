# SPDX-License-Identifier: Apache-2.0
"""A device's own data against a bundle's manifest: every fault at once, and what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client_sdk.data import OwnData, prepare
from client_sdk.data.labels import class_numbers, label_faults
from client_sdk.errors import DataError
from edge_runtime import preprocess
from protocol.manifest import Manifest, Preprocessing, TrainingSpec
from protocol.tensors import ParamSpec, TensorSpec

NAMES = ("owl", "cat", "dog")  # not in the order of the alphabet


def manifest(preprocessing: Preprocessing, *inputs: tuple[str, TensorSpec]) -> Manifest:
    return Manifest(
        job="ab" * 32,
        backbone="none",
        method="none",
        task="classification",
        class_names=NAMES,
        trainable=ParamSpec.of({"a": np.zeros(2, np.float32)}),
        state=ParamSpec(()),
        inputs=inputs,
        preprocessing=preprocessing,
        training=TrainingSpec(batch_size=8, optimizer="sgd", learning_rate=0.1),
        graphs={},
    )


IMAGES = manifest(
    Preprocessing(kind="image", size=4, channels=1, mean=(0.5,), std=(0.5,)),
    ("pixel_values", TensorSpec((1, 4, 4), "float32")),
)
TOKENS = manifest(
    Preprocessing(kind="tokens", max_length=5),
    ("input_ids", TensorSpec((5,), "int64")),
    ("attention_mask", TensorSpec((1, 1, 5), "float32")),
)
ARRAYS = manifest(
    Preprocessing(kind="array"),
    ("x", TensorSpec((3,), "float32")),
    ("kind", TensorSpec((), "int64")),
)


def names(*labels: str) -> np.ndarray:
    return np.array(labels, object)


def own(*fit: Mapping[str, Any], held_out: tuple[Mapping[str, Any], ...] = ()) -> OwnData:
    return OwnData(address="mine", fit=fit, held_out=held_out)


def faults(of: Manifest, data: OwnData, **options: Any) -> list[str]:
    with pytest.raises(DataError) as caught:
        prepare(of, data, **options)
    for fault in caught.value.faults:
        assert fault in str(caught.value)
    assert str(caught.value).startswith("mine does not fit the bundle")
    return list(caught.value.faults)


# What comes out


def test_names_are_mapped_by_the_bundles_class_names_and_sizes_may_differ() -> None:
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (2, 4, 4), np.uint8)
    large = rng.integers(0, 256, (1, 9, 7, 3), np.uint8)
    data = prepare(
        IMAGES,
        own(
            {"images": small, "labels": names("cat", "dog")},
            {"images": large, "labels": names("owl"), "pixel_values": np.zeros(7)},
        ),
    )
    assert data.fit.keys() == {"pixel_values", "labels"} and data.held_out == {}, "the rest is left"
    assert data.fit["labels"].dtype == np.int64 and data.fit["labels"].tolist() == [1, 2, 0]
    for rows, images in ((slice(0, 2), small), (slice(2, 3), large)):
        alone = preprocess(IMAGES.preprocessing, {"images": images})["pixel_values"]
        np.testing.assert_array_equal(data.fit["pixel_values"][rows], alone)


def test_tokens_and_arrays_come_out_as_the_bundle_reads_them() -> None:
    block = {
        "input_ids": np.array([[3, 4], [5, 0]]),
        "attention_mask": np.array([[1, 1], [1, 0]]),
        "labels": np.array([2, 0], np.uint8),
        "note": np.array(["not", "looked", "at"]),
    }
    data = prepare(TOKENS, own(block)).fit
    assert data["input_ids"].shape == (2, 5) and data["labels"].tolist() == [2, 0]
    assert data.keys() == {"input_ids", "attention_mask", "labels"}
    block = {"x": np.ones((2, 3)), "kind": np.arange(2), "labels": names("dog", "dog")}
    data = prepare(ARRAYS, own(block)).fit
    assert data["x"].dtype == np.float32 and data["labels"].tolist() == [2, 2]


def test_held_out_samples_are_the_same_ones_as_data_grow_and_in_any_order() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 4, 4), np.uint8)

    def held(rows: np.ndarray) -> set[bytes]:
        block = {"images": images[rows], "labels": rows % 3}
        data = prepare(IMAGES, own(block), held_out=0.2)
        apart = {row.tobytes() for row in data.held_out["pixel_values"]}
        assert len(apart) == round(0.2 * len(rows)) == len(data.held_out["labels"])
        assert not apart & {row.tobytes() for row in data.fit["pixel_values"]}
        assert len(data.fit["labels"]) + len(apart) == len(rows)
        return apart

    whole = held(np.arange(60))
    assert held(rng.permutation(60)) == whole
    # Nine of ten that were held out of fifty still are.
    assert len(held(np.arange(50)) - whole) <= 1
    source = own({"images": images[:4], "labels": np.zeros(4, int)})
    assert prepare(IMAGES, replace(source, held_out=source.fit), held_out=0.5).fit[
        "labels"
    ].shape == (4,), "what the source holds out is enough"
    one = own({"images": images[:1], "labels": np.zeros(1, int)})
    assert len(prepare(IMAGES, one, held_out=0.5).fit["labels"]) == 1


def test_padding_does_not_move_a_text_out_of_the_held_out_ones() -> None:
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(1, 9, (20, 3)), np.ones((20, 3), int)
    block = {"input_ids": ids, "attention_mask": mask, "labels": np.zeros(20, int)}
    wide = {name: np.pad(block[name], ((0, 0), (0, 2))) for name in ("input_ids", "attention_mask")}
    apart = [
        prepare(TOKENS, own(some), held_out=0.3).held_out["input_ids"]
        for some in (block, {**wide, "labels": block["labels"]})
    ]
    np.testing.assert_array_equal(*apart)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A folder with a tokenizer of three words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = ("[PAD]", "[UNK]", "red", "stone", "blue")
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_texts_become_tokens_when_a_tokenizer_is_there(tokenizer: Path) -> None:
    text = {"texts": np.array(["red stone", "blue"], object), "labels": names("cat", "dog")}
    data = prepare(TOKENS, own(text), tokenizer=tokenizer).fit
    assert data["input_ids"].tolist() == [[2, 3, 0, 0, 0], [4, 0, 0, 0, 0]]
    (fault,) = faults(TOKENS, own(text))
    assert "the bundle brings no tokenizer" in fault and 'ready "input_ids"' in fault
    (fault,) = faults(TOKENS, own(text), tokenizer=tokenizer.parent)
    assert "expected tokenizer.json, found none" in fault
    for texts in (np.array(["red", 5], object), np.array(["red", " "]), np.array([["red"]] * 2)):
        told = faults(TOKENS, own({**text, "texts": texts}), tokenizer=tokenizer)
        assert told == ['"texts": expected strings with content, one a sample']


# Faults


def test_every_fault_is_listed_in_one_error() -> None:
    block = {
        "images": np.zeros((3, 4, 4, 4), np.float32),
        "labels": names("cat", "cow", "hen"),
    }
    held = {"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0, 7])}
    told = faults(IMAGES, own(block, held_out=(held,)))
    assert len(told) == 4
    assert told[0].startswith('"images": expected uint8 values 0 to 255, found float32; scale')
    assert told[1] == '"images": expected 1 or 3 channels, found 4'
    assert told[2] == (
        "labels: expected class names of the bundle (owl, cat, dog), found 'cow' (1), 'hen' (1); "
        "rename these classes, or leave their samples out"
    )
    assert told[3].startswith("held-out data: labels: expected 0 to 2 (3 classes), found 0 to 7")


PIXELS = np.zeros((2, 4, 4), np.uint8)
TWO, ONE = np.arange(2), np.zeros(1, int)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"images": PIXELS[0], "labels": np.arange(4)}, ["[n, height, width]", "0 to 2"]),
        ({"pictures": PIXELS, "labels": TWO}, ['"images", found labels, pictures']),
        ({"images": PIXELS}, ['array "labels", one a sample, found images']),
        ({"images": PIXELS, "labels": np.zeros(2)}, ["found float64; convert them"]),
        ({"images": PIXELS, "labels": np.array([True, False])}, ["found bool"]),
        ({"images": PIXELS, "labels": np.array([1, "a"], object)}, ["other objects"]),
        ({"images": PIXELS, "labels": np.zeros((2, 1), int)}, ["an array int64 [2, 1]"]),
        ({"images": PIXELS, "labels": np.array([-1, 0])}, ["in 1 samples, sample 0 first"]),
        ({"images": PIXELS, "labels": np.arange(3)}, ['"images" 2, "labels" 3']),
        ({"images": [0], "labels": [1]}, ['"images": expected a numpy', '"labels": expected a']),
        ({}, ["found nothing", "expected arrays by name, found none"]),
    ],
)
def test_images_that_do_not_fit_are_told(block: dict[str, Any], words: list[str]) -> None:
    check_told(IMAGES, block, words)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (
            {"input_ids": np.ones((1, 2)), "attention_mask": np.ones((1, 2), int), "labels": ONE},
            ["expected integers [n, tokens]"],
        ),
        (
            {"input_ids": np.ones((1, 2), int), "labels": ONE},
            ['"attention_mask", found input_ids, labels'],
        ),
        (
            {"input_ids": -np.ones((1, 2), int), "attention_mask": np.zeros((1, 2), int)},
            ['"labels"', "expected 0 or more, found -1", "expected a token or more"],
        ),
    ],
)
def test_tokens_that_do_not_fit_are_told(block: dict[str, Any], words: list[str]) -> None:
    check_told(TOKENS, block, words)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (
            {"x": np.full((1, 3), np.nan), "kind": np.zeros(1), "labels": ONE},
            ['"x": expected finite values', 'input "kind": expected int64 [1], found float32'],
        ),
        (
            {"x": np.ones((1, 2)), "labels": ONE},
            ['"x": expected float32 [1, 3], found float32 [1, 2]', 'input "kind" is missing'],
        ),
        ({"x": np.full((1, 3), 1e300), "kind": ONE, "labels": ONE}, ["in the range of float32"]),
    ],
)
def test_arrays_that_do_not_fit_are_told(block: dict[str, Any], words: list[str]) -> None:
    check_told(ARRAYS, block, words)


def check_told(of: Manifest, block: dict[str, Any], words: list[str]) -> None:
    told = faults(of, own(block))
    assert len(told) == len(words), told
    for fault, expected in zip(told, words, strict=True):
        assert expected in fault


def test_too_few_samples_are_told() -> None:
    block = {"images": PIXELS, "labels": np.arange(2)}
    (fault,) = faults(IMAGES, own(block), least_samples=3)
    assert fault == ("data: expected at least 3 samples to train on, found 2; collect more first")
    (fault,) = faults(IMAGES, own(block), least_samples=2, held_out=0.5)
    assert "found 1 beside 1 held out" in fault
    none = {"images": PIXELS[:0], "labels": np.arange(0)}
    assert faults(IMAGES, own(none)) == ["data: expected one sample or more, found none"]
    (fault,) = faults(IMAGES, own())
    assert "at least 1 samples to train on, found 0" in fault
    with pytest.raises(DataError, match="held_out: expected a share of 0 to below 1, found 1"):
        prepare(IMAGES, own(block), held_out=1)


def test_faults_of_many_blocks_are_told_once() -> None:
    blocks = [
        {"images": np.zeros((1, side, 4), np.uint8), "labels": names("cow")} for side in range(2, 9)
    ]
    (fault,) = faults(IMAGES, own(*blocks))
    assert "'cow' (7)" in fault


# Labels


def test_integers_are_names_when_the_classes_are_named_by_numbers() -> None:
    assert class_numbers(np.array([10, 9, 10]), ("9", "10")).tolist() == [1, 0, 1]
    assert class_numbers(names("10", "9"), ("9", "10")).tolist() == [1, 0]
    (fault,) = label_faults(np.array([0, 9]), ("9", "10"))
    assert "(9, 10), found '0' (1)" in fault
    assert class_numbers(np.array([1, 0]), ("01", "10")).tolist() == [1, 0], '"01" is no number'


def test_name_of_two_classes_is_refused() -> None:
    (fault,) = label_faults(names("a", "b"), ("a", "a", "b"))
    assert "2 classes named 'a'; give class numbers" in fault
    assert list(label_faults(names("b"), ("a", "a", "b"))) == []
    assert list(label_faults(np.array([0, 1, 2]), ("a", "a", "b"))) == []


def test_long_lists_of_classes_are_cut_in_the_message() -> None:
    many = tuple(f"c{number}" for number in range(30))
    (fault,) = label_faults(names("x", *many), many)
    assert "c9 and 20 more" in fault and "c10" not in fault


CLASSES = st.lists(st.text("ab01", min_size=1, max_size=3), min_size=1, max_size=6, unique=True)


@given(classes=CLASSES, data=st.data())
def test_every_known_name_gets_the_number_of_its_class(classes: list[str], data: Any) -> None:
    chosen = data.draw(st.lists(st.sampled_from(classes), min_size=1))
    for labels in (names(*chosen), np.array(chosen)):
        assert list(label_faults(labels, classes)) == []
        assert [classes[number] for number in class_numbers(labels, classes)] == chosen


@given(
    labels=st.lists(st.integers(-3, 9), min_size=1),
    classes=st.lists(st.sampled_from(["0", "1", "2", "5", "a"]), min_size=1, unique=True),
)
def test_labels_without_a_fault_are_numbers_of_classes(
    labels: list[int], classes: list[str]
) -> None:
    array = np.array(labels)
    if not list(label_faults(array, classes)):
        found = class_numbers(array, classes)
        assert found.min() >= 0 and found.max() < len(classes)
