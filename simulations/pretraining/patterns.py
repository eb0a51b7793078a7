# SPDX-License-Identifier: Apache-2.0
"""Generated images without characters: shapes, textures and fractals.

*Source*: fractals after Kataoka et al., "Pre-training without natural images", ACCV 2020: a
class is an iterated function system, its members are small changes of the parameters.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from simulations.pretraining.glyphs import BOX, CANVAS, Bank

_SCALE = 4  # shapes are drawn larger and reduced, for smooth edges
_MARGIN = (CANVAS - BOX) // 2


def _polygon(n_corners: int, inner: float = 1.0) -> np.ndarray:
    """A regular polygon, or a star if every second corner is drawn in to radius `inner`."""
    n_points = n_corners if inner == 1.0 else 2 * n_corners
    angle = np.arange(n_points) * 2 * np.pi / n_points - np.pi / 2
    radius = np.where(np.arange(n_points) % 2 == 0, 1.0, inner)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) * radius[:, None]


def _outline(*points: tuple[float, float]) -> np.ndarray:
    return np.array(points)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([np.sin(t) ** 3, -y / 16], axis=1)


def _crescent() -> np.ndarray:
    t = np.linspace(-np.pi / 2, np.pi / 2, 20)
    outer = np.stack([np.cos(t), np.sin(t)], axis=1)
    inner = np.stack([0.4 * np.cos(t), np.sin(t)], axis=1)
    return np.concatenate([outer, inner[::-1]]) - [0.5, 0]


_P = 0.33  # half the width of a bar
# Outlines in [-1, 1]^2; every one gives two classes, filled and as a line.
SHAPES: tuple[np.ndarray, ...] = (
    _polygon(48),
    _polygon(3),
    _polygon(4),
    _polygon(5),
    _polygon(6),
    _polygon(4, 0.35),
    _polygon(5, 0.45),
    _polygon(8, 0.6),
    _heart(),
    _crescent(),
    _outline((-1, -0.4), (1, -0.4), (1, 0.4), (-1, 0.4)),
    _outline((-0.5, -0.6), (0.5, -0.6), (1, 0.6), (-1, 0.6)),
    _outline((-0.4, -0.6), (1, -0.6), (0.4, 0.6), (-1, 0.6)),
    _outline(
        *((-_P, -1), (_P, -1), (_P, -_P), (1, -_P), (1, _P), (_P, _P)),
        *((_P, 1), (-_P, 1), (-_P, _P), (-1, _P), (-1, -_P), (-_P, -_P)),
    ),
    _outline(
        *((-1, -0.25), (0.2, -0.25), (0.2, -0.8), (1, 0), (0.2, 0.8), (0.2, 0.25)),
        (-1, 0.25),
    ),
    _outline((-1, -1), (1, -1), (1, -0.4), (0.3, -0.4), (0.3, 1), (-0.3, 1), (-0.3, -0.4))[:7],
    _outline((-1, -1), (-0.3, -1), (-0.3, 0.4), (1, 0.4), (1, 1), (-1, 1)),
    _outline((-1, -1), (1, -1), (-1, 1), (1, 1)),
    _outline((-1, -1), (-0.2, 0), (-1, 1), (1, 0)),
)


def draw_shape(label: int, rng: np.random.Generator) -> np.ndarray:
    """One image uint8 `[40, 40]` of shape `label // 2`, filled if `label` is even."""
    outline = SHAPES[label // 2]
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    stretch = np.diag([1.0, rng.uniform(0.6, 1.0)])
    points = outline @ stretch @ turn
    points = points / np.abs(points).max() * (BOX / 2) * rng.uniform(0.6, 1.0)
    points = (points + CANVAS / 2 + rng.uniform(-2, 2, 2)) * _SCALE
    canvas = Image.new("L", (CANVAS * _SCALE, CANVAS * _SCALE))
    pen = ImageDraw.Draw(canvas)
    path = [(float(x), float(y)) for x, y in points]
    if label % 2 == 0:
        pen.polygon(path, fill=255)
    else:
        width = round(rng.uniform(1.5, 4) * _SCALE)
        pen.line([*path, *path[:2]], fill=255, width=width, joint="curve")
    return np.asarray(canvas.resize((CANVAS, CANVAS), Image.Resampling.BOX))


def _plane(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of all pixels, turned at random."""
    y, x = np.mgrid[0:CANVAS, 0:CANVAS] - CANVAS / 2.0
    angle = rng.uniform(0, np.pi)
    return np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x


def _wave(x: np.ndarray, rng: np.random.Generator, low: float = 4, high: float = 12) -> np.ndarray:
    return np.sin(2 * np.pi * x / rng.uniform(low, high) + rng.uniform(0, 2 * np.pi))


def _stripes(rng: np.random.Generator) -> np.ndarray:
    return _wave(_plane(rng)[0], rng)


def _hard_stripes(rng: np.random.Generator) -> np.ndarray:
    return np.sign(_wave(_plane(rng)[0], rng) - rng.uniform(-0.6, 0.6))


def _checks(rng: np.random.Generator) -> np.ndarray:
    x, y = _plane(rng)
    period = rng.uniform(6, 14)
    return np.sign(np.sin(2 * np.pi * x / period) * np.sin(2 * np.pi * y / period))


def _dots(rng: np.random.Generator) -> np.ndarray:
    x, y = _plane(rng)
    period = rng.uniform(5, 11)
    wave = np.cos(2 * np.pi * x / period) + np.cos(2 * np.pi * y / period)
    return np.sign(wave - rng.uniform(0.4, 1.2))


def _net(rng: np.random.Generator) -> np.ndarray:
    x, y = _plane(rng)
    period, edge = rng.uniform(6, 12), rng.uniform(0.7, 0.9)
    return np.sign(
        np.maximum(np.cos(2 * np.pi * x / period), np.cos(2 * np.pi * y / period)) - edge
    )


def _rings(rng: np.random.Generator) -> np.ndarray:
    x, y = _plane(rng)
    return _wave(np.hypot(x - rng.uniform(-8, 8), y - rng.uniform(-8, 8)), rng)


def _rays(rng: np.random.Generator) -> np.ndarray:
    x, y = _plane(rng)
    angle = np.arctan2(y - rng.uniform(-6, 6), x - rng.uniform(-6, 6))
    return np.sin(int(rng.integers(4, 10)) * angle)


def _spiral(rng: np.random.Generator) -> np.ndarray:
    x, y = _plane(rng)
    arms = int(rng.integers(1, 4)) * rng.choice([-1, 1])
    radius = np.hypot(x, y)
    return np.sin(2 * np.pi * radius / rng.uniform(7, 14) + arms * np.arctan2(y, x))


def _ripples(rng: np.random.Generator) -> np.ndarray:
    x, y = _plane(rng)
    return _wave(x + rng.uniform(2, 4) * _wave(y, rng, 8, 16), rng, 5, 10)


def _bricks(rng: np.random.Generator) -> np.ndarray:
    x, y = _plane(rng)
    height = rng.uniform(5, 9)
    row = np.floor(y / height)
    along = (x / (2 * height) + 0.5 * (row % 2)) % 1
    joint = rng.uniform(0.12, 0.25)
    return np.where((y / height % 1 < joint) | (along < joint / 2), -1.0, 1.0)


def _gradient(rng: np.random.Generator) -> np.ndarray:
    return _plane(rng)[0] / CANVAS


def _spots(rng: np.random.Generator) -> np.ndarray:
    x, y = _plane(rng)
    image = np.full((CANVAS, CANVAS), -1.0)
    for _ in range(rng.integers(6, 20)):
        centre = rng.uniform(-CANVAS / 2, CANVAS / 2, 2)
        image[np.hypot(x - centre[0], y - centre[1]) < rng.uniform(1.5, 5)] = 1.0
    return image


def _cells(rng: np.random.Generator) -> np.ndarray:
    x, y = _plane(rng)
    centres = rng.uniform(-CANVAS / 2, CANVAS / 2, (rng.integers(8, 25), 2))
    distance = np.hypot(x[..., None] - centres[:, 0], y[..., None] - centres[:, 1])
    nearest = np.sort(distance, axis=-1)
    return np.minimum((nearest[..., 1] - nearest[..., 0]) / 3, 1)


def _noise(rng: np.random.Generator, grain: int) -> np.ndarray:
    side = -(-CANVAS // grain) + 1
    coarse = Image.fromarray(rng.normal(size=(side, side)).astype(np.float32))
    return np.asarray(coarse.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC))


def _fine_noise(rng: np.random.Generator) -> np.ndarray:
    return _noise(rng, 2)


def _clouds(rng: np.random.Generator) -> np.ndarray:
    return _noise(rng, 10) + 0.5 * _noise(rng, 5) + 0.25 * _noise(rng, 3)


def _patches(rng: np.random.Generator) -> np.ndarray:
    return np.sign(_noise(rng, 7) - rng.uniform(-0.4, 0.4))


TEXTURES: tuple[Callable[[np.random.Generator], np.ndarray], ...] = (
    *(_stripes, _hard_stripes, _checks, _dots, _net, _rings, _rays, _spiral, _ripples),
    *(_bricks, _gradient, _spots, _cells, _fine_noise, _clouds, _patches),
)


def draw_texture(label: int, rng: np.random.Generator) -> np.ndarray:
    """One image uint8 `[40, 40]` of texture `label`, over the whole range of grey."""
    image = TEXTURES[label](rng)
    low, high = image.min(), image.max()
    return np.uint8(255 * (image - low) / max(high - low, 1e-6))


def draw_fractals(
    n_classes: int, n_per_class: int, rng: np.random.Generator, n_walkers: int = 100
) -> Bank:
    """Iterated function systems by the chaos game, all members of a class at once.

    *Shapes*: maps `[members, n_maps, 2, 3]`, points `[members, walkers, 2]`.
    """
    images = np.concatenate([_fractal_class(n_per_class, n_walkers, rng) for _ in range(n_classes)])
    labels = np.repeat(np.arange(n_classes, dtype=np.int64), n_per_class)
    return Bank(images=images, labels=labels, n_classes=n_classes)


def _fractal_class(n_members: int, n_walkers: int, rng: np.random.Generator) -> np.ndarray:
    """Draw systems until one spreads over enough pixels to be recognised."""
    while True:
        n_maps = int(rng.integers(2, 6))
        images = _chaos_game(_contractions(n_maps, rng), n_members, n_walkers, rng)
        cover = (images > 0).mean(axis=(1, 2))
        if 0.08 <= cover.mean() <= 0.45:
            return images


def _contractions(n_maps: int, rng: np.random.Generator) -> np.ndarray:
    """Affine maps `[n_maps, 2, 3]` whose linear parts shrink everything."""
    linear = rng.uniform(-1, 1, (n_maps, 2, 2))
    norm = np.linalg.norm(linear, ord=2, axis=(1, 2))
    linear *= (rng.uniform(0.4, 0.85, n_maps) / norm)[:, None, None]
    return np.concatenate([linear, rng.uniform(-1, 1, (n_maps, 2, 1))], axis=2)


def _chaos_game(
    maps: np.ndarray, n_members: int, n_walkers: int, rng: np.random.Generator
) -> np.ndarray:
    """Members uint8 `[n_members, 40, 40]` of one class; brightness is the density of points."""
    member_maps = maps * rng.uniform(0.88, 1.12, (n_members, *maps.shape))
    weight = np.abs(np.linalg.det(maps[:, :, :2])) + 0.02
    weight /= weight.sum()
    points = np.zeros((n_members, n_walkers, 2))
    rows = np.arange(n_members)[:, None]
    visited = []
    for step in range(40):
        chosen = rng.choice(len(maps), size=(n_members, n_walkers), p=weight)
        picked = member_maps[rows, chosen]
        points = np.einsum("mwij,mwj->mwi", picked[..., :2], points) + picked[..., 2]
        if step >= 10:  # by then the walkers are on the attractor
            visited.append(points)
    cloud = np.concatenate(visited, axis=1)
    low, high = np.percentile(cloud, [1, 99], axis=1)
    span = np.maximum((high - low).max(axis=1), 1e-6)[:, None, None]
    pixel = ((cloud - (low + high)[:, None] / 2) / span + 0.5) * (BOX - 1) + _MARGIN
    pixel = np.clip(np.rint(pixel), 0, CANVAS - 1).astype(np.int64)
    flat = (rows * CANVAS + pixel[..., 1]) * CANVAS + pixel[..., 0]
    counts = np.bincount(flat.ravel(), minlength=n_members * CANVAS * CANVAS)
    counts = counts.reshape(n_members, CANVAS, CANVAS)
    return np.uint8(255 * np.minimum(counts / 4, 1) ** 0.5)


def draw_pattern_bank(n_per_class: int, n_fractals: int, rng: np.random.Generator) -> Bank:
    """Shapes, textures and fractals in one bank; the classes follow one another."""
    n_shapes = 2 * len(SHAPES)
    drawn = [draw_shape(k, rng) for k in range(n_shapes) for _ in range(n_per_class)]
    drawn += [draw_texture(k, rng) for k in range(len(TEXTURES)) for _ in range(n_per_class)]
    fractals = draw_fractals(n_fractals, max(1, n_per_class // 4), rng)
    n_drawn_classes = n_shapes + len(TEXTURES)
    labels = np.repeat(np.arange(n_drawn_classes, dtype=np.int64), n_per_class)
    return Bank(
        images=np.concatenate([np.stack(drawn), fractals.images]),
        labels=np.concatenate([labels, fractals.labels + n_drawn_classes]),
        n_classes=n_drawn_classes + n_fractals,
    )
