# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from edge_runtime import DataError, preprocess, preprocessing
from edge_runtime.preprocessing import apply
from protocol import Preprocessing

TOKENS = Preprocessing(kind="tokens", max_length=4)
ARRAY = Preprocessing(kind="array")


def image(size: int, channels: int = 1) -> Preprocessing:
    mean, std = (0.4, 0.5, 0.6)[:channels], (0.2, 0.25, 0.3)[:channels]
    return Preprocessing(kind="image", size=size, channels=channels, mean=mean, std=std)


def slow_pixels(settings: Preprocessing, images: np.ndarray) -> np.ndarray:
    """Bilinear, half-pixel centres, no antialiasing, pixel by pixel in Python floats."""
    if images.ndim == 3:
        images = images[..., None]
    n, height, width, given = images.shape
    side = settings.size
    out = np.empty((n, settings.channels, side, side))

    def source(image: np.ndarray, y: int, x: int, channel: int) -> float:
        pixel = image[y, x].tolist()
        if given == 3 and settings.channels == 1:
            return 0.299 * pixel[0] + 0.587 * pixel[1] + 0.114 * pixel[2]
        return pixel[0] if given == 1 else pixel[channel]

    def around(i: int, old: int) -> tuple[int, int, float]:
        centre = min(max((i + 0.5) * old / side - 0.5, 0.0), old - 1.0)
        low = math.floor(centre)
        return low, min(low + 1, old - 1), centre - low

    for index in np.ndindex(*out.shape):
        k, channel, y, x = index
        y0, y1, fy = around(y, height)
        x0, x1, fx = around(x, width)
        top = source(images[k], y0, x0, channel) * (1 - fx)
        top += source(images[k], y0, x1, channel) * fx
        low = source(images[k], y1, x0, channel) * (1 - fx)
        low += source(images[k], y1, x1, channel) * fx
        value = (top * (1 - fy) + low * fy) / 255
        out[index] = (value - settings.mean[channel]) / settings.std[channel]
    return out


SHAPES = st.tuples(*[st.integers(1, 9)] * 3).flatmap(
    lambda s: st.sampled_from([s, (*s, 1), (*s, 3)])
)


@settings(max_examples=60)
@given(npst.arrays(np.uint8, SHAPES), st.integers(1, 12), st.sampled_from([1, 3]))
def test_images_are_those_of_the_slow_oracle(images, side, channels):
    before = images.tobytes()
    found = apply(image(side, channels), {"images": images})["pixel_values"]
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    np.testing.assert_allclose(found, slow_pixels(image(side, channels), images), atol=2e-5)
    assert images.tobytes() == before


def test_resizing_is_that_of_torch():
    torch = pytest.importorskip("torch")
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 11, 3), np.uint8)
    for side in (5, 8, 28):
        there = torch.nn.functional.interpolate(
            torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255,
            size=(side, side),
            mode="bilinear",
            align_corners=False,
        ).numpy()
        settings = image(side, 3)
        mean, std = (np.array(v, "f4")[:, None, None] for v in (settings.mean, settings.std))
        found = apply(settings, {"images": images})["pixel_values"]
        np.testing.assert_allclose(found, (there - mean) / std, atol=1e-5)


def test_chunks_do_not_show(monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (7, 5, 5), np.uint8)
    whole = apply(image(6), {"images": images})["pixel_values"]
    monkeypatch.setattr(preprocessing, "_CHUNK_VALUES", 72)
    np.testing.assert_array_equal(apply(image(6), {"images": images})["pixel_values"], whole)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((2, 4, 4)), "expected uint8"),
        (np.zeros((2, 4, 4), np.int64), "expected uint8"),
        (np.zeros((2, 4), np.uint8), "expected [n, height, width]"),
        (np.zeros((2, 4, 0), np.uint8), "expected [n, height, width]"),
        (np.zeros((2, 4, 4, 4), np.uint8), "expected 1 or 3 channels"),
        (np.zeros((2, 3, 4, 4, 1), np.uint8), "expected [n, height, width]"),
    ],
)
def test_images_are_refused_when_they_do_not_fit(images, words):
    for channels in (1, 3):
        with pytest.raises(DataError) as caught:
            apply(image(4, channels), {"images": images})
        assert words in str(caught.value)


def test_tokens_are_padded_cut_and_masked_additively():
    arrays = {
        "input_ids": np.array([[7, 8, 9], [5, 3, 3]], np.int32),
        "attention_mask": np.array([[1, 1, 1], [1, 0, 0]]),
        "labels": np.array([1, 0]),
    }
    found = apply(TOKENS, arrays)
    assert found["input_ids"].tolist() == [[7, 8, 9, 0], [5, 3, 3, 0]]
    assert found["input_ids"].dtype == np.int64
    keep, drop = 0.0, -10_000.0
    assert found["attention_mask"].tolist() == [
        [[[keep, keep, keep, drop]]],
        [[[keep, drop, drop, drop]]],
    ]
    assert found["attention_mask"].dtype == np.float32
    assert found["labels"] is arrays["labels"]
    short = apply(Preprocessing(kind="tokens", max_length=2), arrays)
    assert short["input_ids"].tolist() == [[7, 8], [5, 3]]
    assert short["attention_mask"].shape == (2, 1, 1, 2)


@pytest.mark.parametrize(
    ("ids", "mask", "words"),
    [
        (np.zeros((1, 2)), np.ones((1, 2), int), "expected integers"),
        (np.zeros(2, int), np.ones(2, int), "expected integers [n, tokens]"),
        (np.zeros((1, 2), int), np.ones((1, 3), int), "in the shape"),
        (np.zeros((1, 2), int), np.ones((1, 2)), "found float64"),
        (np.array([[-1, 0]]), np.ones((1, 2), int), "0 or more, found -1"),
        (np.zeros((1, 2), int), np.array([[1, 2]]), "expected 0 and 1"),
        (np.zeros((2, 2), int), np.array([[1, 1], [0, 0]]), "sample 1 first"),
        (np.zeros((1, 0), int), np.zeros((1, 0), int), "sample 0 first"),
        (np.zeros((1, 5), int), np.array([[0, 0, 0, 0, 1]]), "within 4 tokens"),
    ],
)
def test_tokens_are_refused_when_they_do_not_fit(ids, mask, words):
    with pytest.raises(DataError) as caught:
        apply(TOKENS, {"input_ids": ids, "attention_mask": mask})
    assert words in str(caught.value)


def test_arrays_pass_with_floats_as_float32():
    arrays = {"x": np.array([[0.5], [1.5]]), "labels": np.array([0, 1])}
    found = apply(ARRAY, arrays)
    assert found["x"].dtype == np.float32
    assert found["x"].tolist() == arrays["x"].tolist()
    assert found["labels"] is arrays["labels"]


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
def test_arrays_are_refused_when_a_value_is_not_finite_in_float32(value):
    with pytest.raises(DataError, match='"x"'):
        apply(ARRAY, {"x": np.array([0, value])})


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({}, "found none"),
        ({"x": [1.0]}, "expected a numpy array, found a list"),
        ({"x": np.array(1.0)}, "found a single value"),
        ({"x": np.zeros(2), "labels": np.zeros(3, int)}, '"x" 2, "labels" 3'),
        ({"x": np.zeros((0, 2))}, "expected one sample or more"),
    ],
)
def test_data_are_refused_when_rows_do_not_agree(arrays, words):
    with pytest.raises(DataError) as caught:
        apply(ARRAY, arrays)
    assert words in str(caught.value)


def test_a_missing_array_is_named():
    with pytest.raises(DataError, match='"images", found labels'):
        apply(image(4), {"labels": np.zeros(2, int)})
    with pytest.raises(DataError, match='"attention_mask", found input_ids'):
        apply(TOKENS, {"input_ids": np.zeros((2, 2), int)})


def test_an_array_named_like_a_model_input_is_refused():
    images = np.zeros((1, 4, 4), np.uint8)
    with pytest.raises(DataError, match="named like a model input"):
        apply(image(4), {"images": images, "pixel_values": images})


def test_the_package_exports_apply_under_a_name_that_says_what_it_does():
    assert preprocess is apply
