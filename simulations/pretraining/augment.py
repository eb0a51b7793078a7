# SPDX-License-Identifier: Apache-2.0
"""Random changes to whole batches of images, on the device where the images are.

The family of the changes contains the domain shifts that the project evaluates (rotation,
inversion, blur, noise); the model card of the backbone says so.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, conv2d, grid_sample, interpolate, max_pool2d, pad

from simulations.pretraining.glyphs import BOX, CANVAS

IMAGE_SIDE = 28


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How strongly one source is changed. Names in `_p` are probabilities per image."""

    rotation_sd_deg: float = 10.0
    wide_rotation_p: float = 0.0  # instead of the above, uniform within `wide_rotation_deg`
    wide_rotation_deg: float = 180.0
    flip_p: float = 0.0  # left to right
    scale_low: float = 0.75  # of the content, 1 fills the image
    scale_high: float = 1.1
    stretch: float = 0.12  # standard deviation of the log of width / height
    shear: float = 0.1  # standard deviation
    shift_px: float = 2.0  # uniform within
    elastic_px: float = 0.0  # standard deviation of the displacement of a 4x4 mesh
    stroke_p: float = 0.0  # thicker or thinner strokes
    low_resolution_p: float = 0.1  # reduced to 7..14 pixels a side, and enlarged again
    eight_px_p: float = 0.0  # the same to exactly 8
    blur_p: float = 0.2  # Gaussian, 0.4 to 2 pixels
    contrast_p: float = 0.4
    invert_p: float = 0.25
    noise_p: float = 0.25  # Gaussian, up to 0.35 of the range
    erase_p: float = 0.0  # a rectangle of up to half a side becomes one grey


def augment(images: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Change every image in its own way and bring it to the network's size and range.

    *Shapes*: uint8 `[n, 40, 40]` to float32 `[n, 1, 28, 28]`.
    *Returns*: values in -1..1 (0..255 rescaled to 0..1, mean 0.5, deviation 0.5).
    """
    x = images.unsqueeze(1).float() / 255
    n = len(x)
    rows = _chosen(n, recipe.stroke_p, generator)
    if len(rows):
        x[rows] = _change_strokes(x[rows], generator)
    x = grid_sample(x, _grid(n, recipe, generator), align_corners=False)
    rows = _chosen(n, recipe.eight_px_p, generator)
    if len(rows):
        x[rows] = _reduce_and_enlarge(x[rows], 8)
    rows = _chosen(n, recipe.low_resolution_p, generator)
    if len(rows):
        side = int(torch.randint(7, 15, (), generator=generator, device=x.device))
        x[rows] = _reduce_and_enlarge(x[rows], side)
    rows = _chosen(n, recipe.erase_p, generator)
    if len(rows):
        x[rows] = _erase(x[rows], generator)
    rows = _chosen(n, recipe.blur_p, generator)
    if len(rows):
        x[rows] = blur(x[rows], float(_uniform((), 0.4, 2.0, generator)))
    rows = _chosen(n, recipe.contrast_p, generator)
    if len(rows):
        x[rows] = _change_contrast(x[rows], generator)
    rows = _chosen(n, recipe.invert_p, generator)
    x[rows] = 1 - x[rows]
    rows = _chosen(n, recipe.noise_p, generator)
    if len(rows):
        strength = _uniform((len(rows), 1, 1, 1), 0.0, 0.35, generator)
        x[rows] += strength * _normal(x[rows].shape, generator)
    return x.clamp(0, 1) * 2 - 1


def blur(x: Tensor, sd_px: float) -> Tensor:
    """Gaussian blur of `[n, 1, h, w]`, edges repeated."""
    radius = min(max(1, math.ceil(2.5 * sd_px)), x.shape[-1] - 1)
    offsets = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (offsets / sd_px) ** 2)
    kernel = kernel / kernel.sum()
    x = pad(x, (radius,) * 4, mode="replicate")
    return conv2d(conv2d(x, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))


def _grid(n: int, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Where every pixel of the result comes from, `[n, 28, 28, 2]` in -1..1 of the canvas."""
    angle = _normal((n,), generator) * recipe.rotation_sd_deg
    wide = _uniform((n,), -recipe.wide_rotation_deg, recipe.wide_rotation_deg, generator)
    is_wide = _uniform((n,), 0, 1, generator) < recipe.wide_rotation_p
    angle = torch.where(is_wide, wide, angle) * (math.pi / 180)
    cos, sin = torch.cos(angle), torch.sin(angle)
    size = _uniform((n,), recipe.scale_low, recipe.scale_high, generator)
    stretch = torch.exp(_normal((n,), generator) * recipe.stretch / 2)
    shear = _normal((n,), generator) * recipe.shear
    flipped = _uniform((n,), 0, 1, generator) < recipe.flip_p
    along_x = stretch / size * torch.where(flipped, -1.0, 1.0)
    along_y = 1 / (stretch * size)
    shift = _uniform((n, 2), -1, 1, generator) * (2 * recipe.shift_px / IMAGE_SIDE)
    # result -> content: turn, then shear, then stretch; 28 of the canvas's 40 pixels are content
    first = torch.stack([along_x * (cos + shear * sin), along_x * (shear * cos - sin)], dim=1)
    second = torch.stack([along_y * sin, along_y * cos], dim=1)
    linear = torch.stack([first, second], dim=1)
    theta = torch.cat([linear, shift.unsqueeze(2)], dim=2) * (BOX / CANVAS)
    grid = affine_grid(theta, [n, 1, IMAGE_SIDE, IMAGE_SIDE], align_corners=False)
    if recipe.elastic_px:
        strength = recipe.elastic_px * _uniform((n, 1, 1, 1), 0, 1.5, generator)
        mesh = _normal((n, 2, 4, 4), generator) * strength * (2 / CANVAS)
        field = interpolate(mesh, size=(IMAGE_SIDE, IMAGE_SIDE), mode="bicubic", align_corners=True)
        grid = grid + field.permute(0, 2, 3, 1)
    return grid


def _change_strokes(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mix each image with a thicker (half of them) or a thinner version of itself."""
    n_thicker = len(x) // 2
    thicker = max_pool2d(x[:n_thicker], 3, stride=1, padding=1)
    thinner = -max_pool2d(-x[n_thicker:], 3, stride=1, padding=1)
    amount = _uniform((len(x), 1, 1, 1), 0, 1, generator)
    # A line two pixels wide would vanish if it were thinned all the way.
    amount[n_thicker:] *= 0.7
    return x + amount * (torch.cat([thicker, thinner]) - x)


def _reduce_and_enlarge(x: Tensor, side: int) -> Tensor:
    small = interpolate(x, size=(side, side), mode="area")
    return interpolate(small, size=x.shape[-2:], mode="bilinear", align_corners=False)


def _erase(x: Tensor, generator: torch.Generator) -> Tensor:
    n, side = len(x), x.shape[-1]
    pixel = torch.arange(side, device=x.device, dtype=x.dtype) + 0.5
    centre = _uniform((n, 2, 1), 0, side, generator)
    half = _uniform((n, 2, 1), side / 16, side / 4, generator)
    inside = (pixel - centre).abs() < half  # [n, 2, side]
    hole = (inside[:, 0, :, None] & inside[:, 1, None, :]).unsqueeze(1)
    return torch.where(hole, _uniform((n, 1, 1, 1), 0, 1, generator), x)


def _change_contrast(x: Tensor, generator: torch.Generator) -> Tensor:
    gain = _uniform((len(x), 1, 1, 1), 0.4, 1.4, generator)
    offset = _uniform((len(x), 1, 1, 1), -0.2, 0.2, generator)
    gamma = torch.exp(_normal((len(x), 1, 1, 1), generator) * 0.3)
    return ((x**gamma - 0.5) * gain + 0.5 + offset).clamp(0, 1)


def _chosen(n: int, probability: float, generator: torch.Generator) -> Tensor:
    return torch.nonzero(_uniform((n,), 0, 1, generator) < probability).flatten()


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device) * (high - low) + low


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)
