# SPDX-License-Identifier: Apache-2.0
"""Images of characters: rendered from font files, and digits drawn stroke by stroke.

Letters that differ only in size, or not at all in many fonts, share a class, because every
glyph is scaled to fill the same box. Digits keep their own classes even where a letter looks
alike (0 and O, 1 and l).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont, TTLibError
from PIL import Image, ImageDraw, ImageFont

CANVAS = 40  # pixels a side of every stored image; the outer 6 are room for distortion
BOX = 28  # pixels of the longer side of the content
POINT_SIZE = 40
MIN_FONT_AGREEMENT = 0.3

GLYPH_CLASSES: tuple[str, ...] = (
    *"0123456789",
    *("cC", "oO", "sS", "vV", "wW", "xX", "zZ", "kK", "pP", "uU", "yY", "Il|"),
    *"ABDEFGHJLMNQRTabdefghijmnqrt",
    *'!?&@#$%*+=/\\()[]{}<>^~;:"',
    *("ΓГ", "ΠП", "ΦФφ", "θΘ"),
    *"ΔΛΞΣΨΩαγδεζηλμξπσψω",
    *("Жж", "Ии", "Йй", "Лл", "Цц", "Чч", "Шш", "Щщ", "Ыы", "Ээ", "Юю", "Яя", "Б", "б", "Дд"),
)
N_DIGITS = 10
N_LATIN = 10 + 12 + 28  # the classes that decide whether a font is a text font

Point = tuple[int, int]
# Per digit, ways of writing it. A way is strokes with bars between them, a stroke the points x,y
# of a smooth curve in percent of the box (x to the right, y downwards). Corners are where strokes
# meet.
DIGIT_STROKES: tuple[tuple[str, ...], ...] = (
    (
        "50,0 15,15 5,50 20,88 50,100 82,85 95,50 82,15 50,0",
        "60,2 25,12 8,55 30,97 70,93 93,50 75,10 45,5",
    ),
    (
        "50,0 50,100",
        "25,25 55,0 | 55,0 55,100",
        "25,20 55,0 | 55,0 55,100 | 25,100 85,100",
    ),
    (
        "10,25 30,3 70,3 88,25 70,50 10,100 | 10,100 95,100",
        "10,25 35,2 75,8 80,35 45,75 15,95 10,82 30,78 60,95 95,92",
    ),
    (
        "10,12 45,0 85,20 70,42 40,48 | 40,48 80,55 92,78 60,100 8,90",
        "10,0 90,0 | 90,0 45,42 | 45,42 85,55 90,82 55,100 8,90",
    ),
    (
        "70,0 70,100 | 70,0 5,70 | 5,70 98,70",
        "20,0 10,55 | 10,55 90,55 | 80,0 75,100",
        "30,0 8,40 30,58 90,50 | 85,10 70,100",
    ),
    (
        "90,0 20,0 | 20,0 15,45 | 15,45 60,38 92,65 65,97 8,95",
        "85,5 40,5 25,40 70,50 75,85 30,100 10,90",
    ),
    (
        "75,2 30,30 10,70 35,100 80,90 85,65 55,50 15,70",
        "50,0 20,45 15,85 50,100 80,80 60,60 20,78",
    ),
    (
        "8,0 92,0 | 92,0 40,100",
        "8,0 92,0 | 92,0 40,100 | 30,50 85,50",
        "8,8 90,3 | 90,3 55,45 45,100",
        "10,20 10,0 | 10,0 92,0 | 92,0 60,50 45,100",
    ),
    (
        "50,48 15,28 50,0 85,25 50,48 10,75 50,100 90,75 50,48",
        "85,12 50,0 15,22 50,47 88,75 50,100 10,78 50,50 85,12",
    ),
    (
        "85,25 50,0 12,25 40,50 80,35 88,10 | 86,20 80,60 60,100",
        "85,20 50,0 15,25 45,50 85,30 | 85,5 85,100",
        "85,30 50,0 15,28 50,50 85,25 88,65 60,100 20,93",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bank:
    """Labelled images: `images` uint8 `[n, 40, 40]`, `labels` int64 `[n]`, classes 0 to n-1."""

    images: np.ndarray
    labels: np.ndarray
    n_classes: int


def find_fonts(folders: Sequence[Path]) -> list[Path]:
    """Font files under `folders`, sorted; matplotlib's bundled fonts where there are none."""
    found = _fonts_under(folders)
    if not found:
        from matplotlib import get_data_path

        found = _fonts_under([Path(get_data_path()) / "fonts"])
    return found


def _fonts_under(folders: Sequence[Path]) -> list[Path]:
    paths = {path for folder in folders for path in folder.rglob("*.[ot]tf")}
    return sorted(path for path in paths if path.is_file())


def render_font_bank(fonts: Sequence[Path]) -> tuple[Bank, int]:
    """Render every class of `GLYPH_CLASSES` in every font that has it.

    Fonts without all ten digits are left out, and so are picture fonts, recognised by glyphs
    that do not resemble what the other fonts draw for the same character.

    *Returns*: the bank and the number of fonts that it uses.
    *Raises*: `ValueError` if no font is left.
    """
    images: list[np.ndarray] = []
    labels: list[int] = []
    owners: list[int] = []
    for owner, path in enumerate(fonts):
        for label, image in _render_font(path):
            images.append(image)
            labels.append(label)
            owners.append(owner)
    if not images:
        raise ValueError(f"none of {len(fonts)} font files has the digits; name another --fonts")
    image_array, label_array = np.stack(images), np.array(labels, dtype=np.int64)
    owner_array = np.array(owners)
    keep = np.isin(owner_array, _text_fonts(image_array, label_array, owner_array))
    bank = Bank(images=image_array[keep], labels=label_array[keep], n_classes=len(GLYPH_CLASSES))
    return bank, len(np.unique(owner_array[keep]))


def _render_font(path: Path) -> list[tuple[int, np.ndarray]]:
    """All classes one font can draw; nothing if it is unreadable or lacks a digit."""
    try:
        with path.open("rb") as file, TTFont(file, lazy=True) as tables:
            available = tables.getBestCmap() or {}
        font = ImageFont.truetype(str(path), POINT_SIZE)
        if any(ord(digit) not in available for digit in "0123456789"):
            return []
        drawn = []
        for label, characters in enumerate(GLYPH_CLASSES):
            for character in characters:
                if ord(character) in available:
                    image = _render_character(font, character)
                    if image is not None:
                        drawn.append((label, image))
        return drawn
    except (OSError, TTLibError, ValueError, KeyError, AssertionError):
        # Font files in the wild are often damaged in ways that only the parser finds out.
        return []


def _render_character(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray | None:
    left, top, right, bottom = font.getbbox(character)
    width, height = int(right - left), int(bottom - top)
    if not (2 <= max(width, height) <= 4 * POINT_SIZE and min(width, height) >= 1):
        return None
    canvas = Image.new("L", (width + 4, height + 4))
    ImageDraw.Draw(canvas).text((2 - left, 2 - top), character, fill=255, font=font)
    return _fit(canvas)


def _fit(image: Image.Image) -> np.ndarray | None:
    """Crop to the ink, scale the longer side to `BOX` pixels, centre on the canvas."""
    bounds = image.getbbox()
    if bounds is None:
        return None
    ink = image.crop(bounds)
    scale = BOX / max(ink.size)
    size = tuple(max(1, round(side * scale)) for side in ink.size)
    ink = ink.resize(size, Image.Resampling.BILINEAR)
    canvas = Image.new("L", (CANVAS, CANVAS))
    canvas.paste(ink, ((CANVAS - size[0]) // 2, (CANVAS - size[1]) // 2))
    return np.asarray(canvas)


def _text_fonts(images: np.ndarray, labels: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """Owners whose Latin glyphs are, often enough, among the 3 nearest of the class means."""
    latin = labels < N_LATIN
    blocks = CANVAS // 4
    coarse = images[latin].reshape(-1, blocks, 4, blocks, 4).mean(axis=(2, 4), dtype=np.float32)
    coarse = coarse.reshape(len(coarse), -1)
    coarse -= coarse.mean(axis=1, keepdims=True)
    coarse /= np.linalg.norm(coarse, axis=1, keepdims=True) + 1e-6  # a full box has no contrast
    present = np.unique(labels[latin])
    means = np.stack([coarse[labels[latin] == label].mean(axis=0) for label in present])
    means /= np.linalg.norm(means, axis=1, keepdims=True) + 1e-6
    similarity = coarse @ means.T
    own = similarity[np.arange(len(coarse)), np.searchsorted(present, labels[latin])]
    agrees = (similarity > own[:, None]).sum(axis=1) < 3
    return np.array(
        [
            owner
            for owner in np.unique(owners[latin])
            if agrees[owners[latin] == owner].mean() >= MIN_FONT_AGREEMENT
        ]
    )


def draw_stroke_digits(n_images: int, rng: np.random.Generator) -> Bank:
    """Digits as a hand writes them: `DIGIT_STROKES` with displaced points, slant and width."""
    images = np.empty((n_images, CANVAS, CANVAS), dtype=np.uint8)
    labels = np.arange(n_images, dtype=np.int64) % N_DIGITS
    for index, digit in enumerate(labels):
        ways = DIGIT_STROKES[digit]
        images[index] = _draw_strokes(_strokes(ways[rng.integers(len(ways))]), rng)
    return Bank(images=images, labels=labels, n_classes=len(GLYPH_CLASSES))


def _strokes(way: str) -> list[list[Point]]:
    return [
        [(int(x), int(y)) for x, y in (point.split(",") for point in stroke.split())]
        for stroke in way.split("|")
    ]


def _draw_strokes(strokes: Sequence[Sequence[Point]], rng: np.random.Generator) -> np.ndarray:
    side = 4 * BOX
    spread = rng.uniform(0.01, 0.06)
    aspect, slant = rng.uniform(0.45, 1.0), rng.uniform(-0.25, 0.35)
    width = rng.uniform(0.05, 0.2) * side
    # Points that strokes share must move together, or corners come apart.
    moved: dict[Point, np.ndarray] = {}
    canvas = Image.new("L", (2 * side, 2 * side))
    pen = ImageDraw.Draw(canvas)
    for stroke in strokes:
        points = []
        for point in stroke:
            if point not in moved:
                moved[point] = np.array(point) / 100 + rng.normal(0, spread, 2)
            points.append(moved[point])
        curve = _smooth(np.stack(points))
        curve[:, 0] = curve[:, 0] * aspect + slant * (0.5 - curve[:, 1])
        path = [(float(x), float(y)) for x, y in curve * side + side / 2]
        pen.line(path, fill=255, width=round(width), joint="curve")
        radius = width / 2
        for x, y in (path[0], path[-1]):
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    image = _fit(canvas)
    if image is None:
        raise ValueError("a stroke digit came out without ink; its strokes lie off the canvas")
    return image


def _smooth(points: np.ndarray, n_steps: int = 8) -> np.ndarray:
    """A Catmull-Rom curve through `points` `[n, 2]`."""
    padded = np.concatenate([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]])
    t = np.linspace(0, 1, n_steps, endpoint=False)[:, None]
    pieces = [
        0.5 * (2 * p1 + (p2 - p0) * t + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2)
        + 0.5 * (3 * p1 - p0 - 3 * p2 + p3) * t**3
        for p0, p1, p2, p3 in zip(padded, padded[1:], padded[2:], padded[3:], strict=False)
    ]
    return np.concatenate([*pieces, points[-1:]])
