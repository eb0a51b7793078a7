# SPDX-License-Identifier: Apache-2.0
"""Domain shifts of images: the same things seen through another camera.

Every function takes uint8 images [n, h, w] or [n, h, w, c] and returns new ones of that shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from simulations.errors import DataError

DOMAINS = ("identity", "rotation", "inversion", "blur", "noise")

ROTATION_DEGREES = 45.0
BLUR_FRACTION = 0.05  # standard deviation of the Gaussian, of the image's shorter side
NOISE_STD = 51.0  # grey levels of 255
CHUNK_IMAGES = 512  # bounds the float copies


def rotation(images: np.ndarray, degrees: float = ROTATION_DEGREES) -> np.ndarray:
    """Turned counter-clockwise about the centre, bilinear; what comes from outside is 0."""
    height, width = images.shape[1:3]
    angle = np.deg2rad(degrees)
    down, right = np.mgrid[:height, :width].astype(np.float64)
    down -= (height - 1) / 2
    right -= (width - 1) / 2
    # Where each pixel of the result comes from: the inverse turn, with rows growing downwards.
    rows = np.cos(angle) * down + np.sin(angle) * right + (height - 1) / 2
    columns = -np.sin(angle) * down + np.cos(angle) * right + (width - 1) / 2
    result = np.empty_like(images)
    for chunk in _chunks(len(images)):
        total = np.zeros(images[chunk].shape, dtype=np.float32)
        for row in (np.floor(rows), np.floor(rows) + 1):
            for column in (np.floor(columns), np.floor(columns) + 1):
                weight = (1 - np.abs(rows - row)) * (1 - np.abs(columns - column))
                inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
                weight = np.where(inside, weight, 0.0).astype(np.float32)
                total += (
                    _over_channels(weight, images)
                    * (
                        images[chunk][
                            :,
                            np.clip(row, 0, height - 1).astype(np.intp),
                            np.clip(column, 0, width - 1).astype(np.intp),
                        ]
                    )
                )
        result[chunk] = _grey_levels(total)
    return result


def inversion(images: np.ndarray) -> np.ndarray:
    """Light and dark exchanged."""
    return 255 - images


def blur(images: np.ndarray, sigma: float | None = None) -> np.ndarray:
    """Gaussian blur, `sigma` in pixels (default: `BLUR_FRACTION` of the shorter side); the border
    pixels are repeated outwards."""
    if sigma is None:
        sigma = BLUR_FRACTION * min(images.shape[1:3])
    if not sigma > 0:
        raise DataError(f"blur: expected a sigma above 0 pixels, found {sigma}")
    radius = max(1, round(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).astype(np.float32)
    result = np.empty_like(images)
    for chunk in _chunks(len(images)):
        smooth = images[chunk].astype(np.float32)
        for axis in (1, 2):
            size = smooth.shape[axis]
            border = [(radius, radius) if i == axis else (0, 0) for i in range(smooth.ndim)]
            padded = np.pad(smooth, border, mode="edge")
            smooth = sum(
                weight * np.take(padded, np.arange(k, k + size), axis=axis)
                for k, weight in enumerate(kernel)
            )
        result[chunk] = _grey_levels(smooth)
    return result


def noise(images: np.ndarray, rng: np.random.Generator, std: float = NOISE_STD) -> np.ndarray:
    """Gaussian noise of `std` grey levels, cut at 0 and 255."""
    result = np.empty_like(images)
    for chunk in _chunks(len(images)):
        drawn = rng.standard_normal(images[chunk].shape, dtype=np.float32)
        result[chunk] = _grey_levels(images[chunk] + std * drawn)
    return result


def shift(images: np.ndarray, domain: str, rng: np.random.Generator) -> np.ndarray:
    """All images moved to one domain; only "noise" draws from `rng`."""
    match domain:
        case "identity":
            return images.copy()
        case "rotation":
            return rotation(images)
        case "inversion":
            return inversion(images)
        case "blur":
            return blur(images)
        case "noise":
            return noise(images, rng)
        case _:
            raise DataError(f'domain "{domain}": expected one of {", ".join(DOMAINS)}')


def shift_each(images: np.ndarray, domains: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Image i moved to the domain `DOMAINS[domains[i]]`; `domains` integer [n]."""
    result = np.empty_like(images)
    for index, domain in enumerate(DOMAINS):
        chosen = domains == index
        result[chosen] = shift(images[chosen], domain, rng)
    return result


def mixed_domains(
    samples: int, rng: np.random.Generator, among: Sequence[int] = range(len(DOMAINS))
) -> np.ndarray:
    """A domain of those `among` for each of `samples` images, int64 [samples], every domain
    equally often (±1)."""
    # Where they do not go up evenly, chance decides which domains come once more.
    first = int(rng.integers(len(among)))
    return rng.permutation(np.take(among, first + np.arange(samples), mode="wrap"))


def _chunks(samples: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK_IMAGES) for start in range(0, samples, CHUNK_IMAGES))


def _over_channels(weight: np.ndarray, images: np.ndarray) -> np.ndarray:
    return weight[:, :, None] if images.ndim == 4 else weight


def _grey_levels(values: np.ndarray) -> np.ndarray:
    levels: np.ndarray = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return levels
