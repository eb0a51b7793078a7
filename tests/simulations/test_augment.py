# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from simulations.pretraining.augment import Recipe, augment, blur
from simulations.pretraining.pretrain import CHARACTERS, CLOTHES, PATTERNS

STILL = {
    "rotation_sd_deg": 0.0,
    "scale_low": 1.0,
    "scale_high": 1.0,
    "stretch": 0.0,
    "shear": 0.0,
    "shift_px": 0.0,
    "low_resolution_p": 0.0,
    "blur_p": 0.0,
    "contrast_p": 0.0,
    "invert_p": 0.0,
    "noise_p": 0.0,
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(n: int = 4) -> torch.Tensor:
    """A bright bar left of the middle, `[n, 40, 40]`."""
    images = torch.zeros((n, 40, 40), dtype=torch.uint8)
    images[:, 12:28, 14:18] = 255
    return images


def still(**changes: float) -> Recipe:
    return Recipe(**(STILL | changes))


def test_content_is_cut_out_unchanged_when_nothing_is_asked() -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 40, 40), np.uint8))
    result = augment(images, still(), generator())
    expected = images[:, 6:34, 6:34].float() / 255 * 2 - 1
    torch.testing.assert_close(result[:, 0], expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("recipe", [CHARACTERS, PATTERNS, CLOTHES])
def test_result_is_in_range_and_repeats_with_the_seed(recipe: Recipe) -> None:
    images = picture(64)
    before = images.clone()
    result = augment(images, recipe, generator(5))
    assert result.shape == (64, 1, 28, 28)
    assert result.dtype == torch.float32
    assert result.isfinite().all()
    assert result.min() >= -1 and result.max() <= 1
    assert torch.equal(result, augment(images, recipe, generator(5)))
    assert not torch.equal(result, augment(images, recipe, generator(6)))
    assert torch.equal(images, before)


def test_bar_lies_down_when_turned_by_a_right_angle() -> None:
    recipe = still(wide_rotation_p=1.0, wide_rotation_deg=90.0)
    results = augment(picture(400), recipe, generator())[:, 0] > 0
    height = results.any(dim=2).sum(dim=1)
    width = results.any(dim=1).sum(dim=1)
    assert (height - width).max() >= 11 and (height - width).min() <= -11
    ink = results.float().sum(dim=(1, 2))
    assert (ink - 64).abs().max() < 16  # a rotation keeps the area


def test_image_is_mirrored_when_flipped() -> None:
    plain = augment(picture(), still(), generator())
    flipped = augment(picture(), still(flip_p=1.0), generator())
    torch.testing.assert_close(flipped, plain.flip(3), atol=1e-3, rtol=0)


def test_area_grows_with_the_square_of_the_scale() -> None:
    ink = [
        (augment(picture(1), still(scale_low=s, scale_high=s), generator()) + 1).sum().item()
        for s in (0.7, 1.0)
    ]
    assert ink[0] / ink[1] == pytest.approx(0.49, rel=0.1)


def test_light_and_dark_are_exchanged_when_inverted() -> None:
    plain = augment(picture(), still(), generator())
    torch.testing.assert_close(augment(picture(), still(invert_p=1.0), generator()), -plain)


def test_strokes_grow_and_shrink() -> None:
    plain = augment(picture(1), still(), generator()).sum()
    changed = augment(picture(100), still(stroke_p=1.0), generator()).sum(dim=(1, 2, 3))
    assert (changed[:50] > plain).all() and (changed[50:] < plain).all()
    assert (changed[50:] > -28 * 28 + 10).all()  # no stroke vanishes


def test_only_eight_pixels_a_side_remain_when_reduced() -> None:
    """Area reduction, bilinear enlargement: what `Dataset` images of 8x8 look like when resized."""
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 40, 40), np.uint8))
    result = augment(images, still(eight_px_p=1.0), generator())
    assert torch.linalg.matrix_rank(result[:, 0], rtol=1e-3).max() <= 9  # 8, and the offset


def test_erasing_leaves_most_of_the_image() -> None:
    plain = augment(picture(50), still(), generator())
    erased = augment(picture(50), still(erase_p=1.0), generator())
    changed = (plain != erased).float().mean(dim=(1, 2, 3))
    assert changed.max() <= 0.27
    assert changed.mean() > 0.02


def test_mean_stays_and_contrast_falls_when_blurred() -> None:
    x = torch.zeros((1, 1, 28, 28))
    x[..., 12:16, 12:16] = 1
    for sd in (0.4, 1.0, 2.0):
        result = blur(x, sd)
        assert result.mean().item() == pytest.approx(x.mean().item(), rel=1e-4)
        assert result.std() < x.std()
    torch.testing.assert_close(blur(torch.ones_like(x), 1.5), torch.ones_like(x))


def test_noise_has_the_promised_strength() -> None:
    grey = torch.full((500, 40, 40), 128, dtype=torch.uint8)
    result = augment(grey, still(noise_p=1.0), generator())
    deviation = result.std(dim=(1, 2, 3)) / 2  # the range is 2
    assert deviation.min() >= 0 and 0.3 < deviation.max() < 0.36
