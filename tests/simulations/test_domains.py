# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from simulations.datasets.domains import (
    CHUNK_IMAGES,
    DOMAINS,
    blur,
    inversion,
    mixed_domains,
    noise,
    rotation,
    shift,
    shift_each,
)
from simulations.errors import DataError

pictures = st.one_of(
    arrays(np.uint8, st.tuples(st.integers(0, 4), st.integers(1, 9), st.integers(1, 9))),
    arrays(
        np.uint8, st.tuples(st.integers(0, 3), st.integers(1, 6), st.integers(1, 6), st.just(3))
    ),
)


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 9, 12), np.uint8)


@given(images=pictures, domain=st.sampled_from(DOMAINS), seed=st.integers(0, 99))
def test_shift_keeps_shape_and_input_and_is_deterministic(
    images: np.ndarray, domain: str, seed: int
) -> None:
    before = images.tobytes()
    first = shift(images, domain, np.random.default_rng(seed))
    second = shift(images, domain, np.random.default_rng(seed))
    assert first.dtype == np.uint8 and first.shape == images.shape
    assert first.tobytes() == second.tobytes()
    assert images.tobytes() == before and not np.shares_memory(first, images)


def test_shift_lists_the_domains_when_unknown(images: np.ndarray) -> None:
    with pytest.raises(DataError, match='"fog": expected one of identity, rotation'):
        shift(images, "fog", np.random.default_rng(0))


@pytest.mark.parametrize("quarter_turns", [0, 1, 2, 3])
def test_rotation_is_exact_when_quarter_turns(images: np.ndarray, quarter_turns: int) -> None:
    square = images[:, :, :9]
    turned = rotation(square, 90 * quarter_turns)
    assert np.array_equal(turned, np.rot90(square, quarter_turns, axes=(1, 2)))
    assert np.array_equal(
        rotation(np.stack([square] * 3, axis=3), 90 * quarter_turns)[..., 1], turned
    )


def test_rotation_agrees_with_scipy_inside(images: np.ndarray) -> None:
    smooth = blur(images, 1.5)
    ours = rotation(smooth, 30.0)[:, 3:6, 4:8].astype(int)
    theirs = ndimage.rotate(smooth.astype(float), 30.0, axes=(1, 2), reshape=False, order=1)
    assert np.abs(ours - theirs[:, 3:6, 4:8]).max() <= 1


@pytest.mark.parametrize("sigma", [0.4, 1.4, 6.0])
def test_blur_agrees_with_scipy(images: np.ndarray, sigma: float) -> None:
    theirs = ndimage.gaussian_filter(
        images.astype(float),
        (0, sigma, sigma),
        mode="nearest",
        radius=(0, *(max(1, round(3 * sigma)),) * 2),
    )
    assert np.abs(blur(images, sigma).astype(float) - theirs).max() <= 0.51
    with pytest.raises(DataError, match="sigma above 0"):
        blur(images, 0.0)


def test_inversion_undoes_itself(images: np.ndarray) -> None:
    assert (inversion(images).astype(int) + images == 255).all()
    assert np.array_equal(inversion(inversion(images)), images)


def test_noise_has_the_asked_spread() -> None:
    flat = np.full((CHUNK_IMAGES + 8, 10, 10), 128, np.uint8)
    noisy = noise(flat, np.random.default_rng(0), std=20.0).astype(float)
    assert abs(noisy.mean() - 128) < 0.5 and abs(noisy.std() - 20) < 0.5
    assert len(np.unique(noisy.reshape(len(flat), -1), axis=0)) == len(flat)


def test_shift_each_moves_every_image_to_its_own_domain(images: np.ndarray) -> None:
    which = np.array([2, 0, 1, 3, 2, 4])
    moved = shift_each(images, which, np.random.default_rng(0))
    assert np.array_equal(moved[[0, 4]], inversion(images[[0, 4]]))
    assert np.array_equal(moved[1], images[1])
    assert np.array_equal(moved[2:3], rotation(images[2:3]))
    assert np.array_equal(moved[3:4], blur(images[3:4]))
    assert np.array_equal(moved[5:], noise(images[5:], np.random.default_rng(0)))


@given(samples=st.integers(0, 60), seed=st.integers(0, 99))
def test_mixed_domains_come_equally_often(samples: int, seed: int) -> None:
    counts = np.bincount(mixed_domains(samples, np.random.default_rng(seed)), minlength=5)
    assert counts.sum() == samples and counts.max() - counts.min() <= 1
