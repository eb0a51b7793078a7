# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from simulations.pretraining.glyphs import CANVAS
from simulations.pretraining.patterns import (
    SHAPES,
    TEXTURES,
    draw_fractals,
    draw_pattern_bank,
    draw_shape,
    draw_texture,
)


@pytest.mark.parametrize("label", range(2 * len(SHAPES)))
def test_shape_has_ink_away_from_the_border(label: int) -> None:
    image = draw_shape(label, np.random.default_rng(label))
    assert image.shape == (CANVAS, CANVAS)
    assert image.max() == 255
    assert 0.02 < (image > 128).mean() < 0.6
    assert not image[[0, -1]].any() and not image[:, [0, -1]].any()


def test_middle_is_empty_when_a_disc_is_drawn_as_a_line() -> None:
    rng = np.random.default_rng(0)
    middle = (slice(18, 22), slice(18, 22))
    assert all(draw_shape(0, rng)[middle].min() == 255 for _ in range(20))
    assert all(draw_shape(1, rng)[middle].max() == 0 for _ in range(20))


@pytest.mark.parametrize("label", range(len(TEXTURES)))
def test_texture_uses_the_whole_range_and_varies(label: int) -> None:
    rng = np.random.default_rng(label)
    first, second = draw_texture(label, rng), draw_texture(label, rng)
    assert first.shape == (CANVAS, CANVAS)
    assert first.dtype == np.uint8
    assert first.min() == 0 and first.max() >= 254
    assert not np.array_equal(first, second)


def test_fractals_of_one_class_resemble_each_other_more_than_others() -> None:
    bank = draw_fractals(6, 8, np.random.default_rng(1))
    assert bank.images.shape == (48, CANVAS, CANVAS)
    flat = bank.images.reshape(48, -1).astype(float)
    flat -= flat.mean(axis=1, keepdims=True)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    alike = flat @ flat.T
    same = bank.labels[:, None] == bank.labels
    np.fill_diagonal(alike, 0)
    assert alike[same].mean() > 2 * alike[~same].mean()
    assert len(np.unique(bank.images, axis=0)) == 48


def test_bank_numbers_its_classes_without_gaps_and_repeats_with_the_seed() -> None:
    bank = draw_pattern_bank(4, 3, np.random.default_rng(0))
    again = draw_pattern_bank(4, 3, np.random.default_rng(0))
    np.testing.assert_array_equal(bank.images, again.images)
    assert bank.n_classes == 2 * len(SHAPES) + len(TEXTURES) + 3
    assert np.unique(bank.labels).tolist() == list(range(bank.n_classes))
    assert len(bank.images) == len(bank.labels)
