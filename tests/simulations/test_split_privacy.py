# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest

from simulations.benchmarks import split_privacy
from simulations.benchmarks.split_privacy import Head, Regression, psnr
from simulations.progress import SilentProgress


def drawn(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8), dtype=np.uint8)


def test_patch_embeddings_give_the_image_itself(tiny_vit: Path) -> None:
    images = drawn(5)
    found = Head("faithful-minimal", tiny_vit).solved(
        Head("faithful-minimal", tiny_vit).states(images)
    )
    assert psnr(found, images) > 80, "16 values a patch, 16 of its embedding: nothing is lost"


def test_regression_finds_what_depends_linearly_on_the_image() -> None:
    images = drawn(400)
    mixing = np.random.default_rng(1).standard_normal((64, 96))
    states = (images.reshape(400, 64) / 255.0 @ mixing).reshape(400, 4, 24)
    learned = Regression(states[:300], images[:300])
    assert psnr(learned(states[300:]), images[300:]) > 25
    nothing = np.random.default_rng(2).standard_normal(states.shape)
    blind = Regression(nothing[:300], images[:300])
    assert psnr(blind(nothing[300:]), images[300:]) < 12


def test_psnr_is_in_decibels() -> None:
    images = np.full((1, 8, 8), 51, np.uint8)  # 0.2
    assert psnr(np.full((1, 8, 8), 0.3), images) == pytest.approx(20.0)
    assert psnr(images / 255.0, images) == math.inf


def test_noise_hides_something_at_every_cut(
    tiny_vit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = drawn(20, seed=7)

    def halves(*, split: str) -> tuple[np.ndarray, np.ndarray]:
        images = drawn(120) if split == "public" else private
        return images, np.zeros(len(images))

    monkeypatch.setattr(split_privacy, "load_fashion_mnist", halves)
    monkeypatch.setattr(split_privacy, "CUTS", ("faithful-minimal", "1+0"))
    monkeypatch.setattr(split_privacy, "Head", lambda cut: Head(cut, tiny_vit))
    made = split_privacy.reconstruction_psnr_db(SilentProgress(), known=120, attacked=20)
    first, second = re.findall(r"(?:faithful-minimal|1\+0): ([^;]+)", made.note)
    by_noise = [
        [float(word.split(" at ")[0]) for word in row.split(", ")] for row in (first, second)
    ]
    assert by_noise[0][0] > 80 and by_noise[0] == sorted(by_noise[0], reverse=True)
    assert by_noise[1][0] == pytest.approx(made.value, abs=0.06)
