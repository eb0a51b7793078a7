# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from simulations.pretraining.glyphs import (
    BOX,
    CANVAS,
    GLYPH_CLASSES,
    Bank,
    draw_stroke_digits,
    find_fonts,
    render_font_bank,
)

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
NAMES = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Italic")


@pytest.fixture(scope="module")
def bank() -> Bank:
    return render_font_bank([FONTS / f"{name}.ttf" for name in NAMES])[0]


def ink_extent(image: np.ndarray) -> int:
    rows, columns = np.nonzero(image)
    return int(max(np.ptp(rows), np.ptp(columns))) + 1


def test_no_character_is_in_two_classes() -> None:
    characters = "".join(GLYPH_CLASSES)
    assert len(set(characters)) == len(characters)
    assert GLYPH_CLASSES[:10] == tuple("0123456789")


def test_every_class_is_drawn_when_fonts_are_complete(bank: Bank) -> None:
    assert bank.images.shape[1:] == (CANVAS, CANVAS)
    assert bank.images.dtype == np.uint8
    assert np.unique(bank.labels).tolist() == list(range(len(GLYPH_CLASSES)))
    assert bank.n_classes == len(GLYPH_CLASSES)


def test_ink_fills_the_box_and_nothing_outside(bank: Bank) -> None:
    # Faint edge pixels may round to nothing.
    assert all(BOX - 2 <= ink_extent(image) <= BOX for image in bank.images)


def test_same_digit_resembles_itself_across_fonts(bank: Bank) -> None:
    digits = bank.labels < 10
    flat = bank.images[digits].reshape(digits.sum(), -1).astype(float)
    labels = bank.labels[digits]
    distance = np.linalg.norm(flat[:, None] - flat[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    assert (labels[distance.argmin(axis=1)] == labels).mean() > 0.7


def test_picture_fonts_and_broken_files_are_left_out(tmp_path: Path) -> None:
    broken = tmp_path / "broken.ttf"
    broken.write_bytes((FONTS / "DejaVuSans.ttf").read_bytes()[:3000])
    fonts = [FONTS / f"{name}.ttf" for name in ("cmex10", *NAMES)]
    bank, n_fonts = render_font_bank([broken, *fonts])
    assert n_fonts == len(NAMES)
    assert len(bank.images) == len(render_font_bank(fonts[1:])[0].images)


def test_error_is_raised_when_no_font_has_digits(tmp_path: Path) -> None:
    (tmp_path / "empty.ttf").write_bytes(b"")
    with pytest.raises(ValueError, match="none of 1 font files"):
        render_font_bank([tmp_path / "empty.ttf"])


def test_bundled_fonts_are_found_when_folder_has_none(tmp_path: Path) -> None:
    assert FONTS / "DejaVuSans.ttf" in find_fonts([tmp_path])
    own = tmp_path / "deep" / "own.otf"
    own.parent.mkdir()
    own.touch()
    assert find_fonts([tmp_path]) == [own]


def test_stroke_digits_repeat_with_the_seed_and_differ_among_themselves() -> None:
    first = draw_stroke_digits(40, np.random.default_rng(3))
    again = draw_stroke_digits(40, np.random.default_rng(3))
    np.testing.assert_array_equal(first.images, again.images)
    assert first.labels.tolist() == list(range(10)) * 4
    assert len(np.unique(first.images, axis=0)) == 40
    assert all(BOX - 2 <= ink_extent(image) <= BOX for image in first.images)


def test_stroke_digits_resemble_rendered_digits(bank: Bank) -> None:
    """Nearest mean of the rendered digits names most stroke digits: chance would be a tenth."""
    means = np.stack(
        [bank.images[bank.labels == digit].mean(axis=0).ravel() for digit in range(10)]
    )
    strokes = draw_stroke_digits(300, np.random.default_rng(0))
    flat = strokes.images.reshape(300, -1) - strokes.images.mean(axis=(1, 2))[:, None]
    means -= means.mean(axis=1, keepdims=True)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    assert ((flat @ means.T).argmax(axis=1) == strokes.labels).mean() > 0.4
