# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from simulations.benchmarks.split_privacy import Head, Regression, psnr


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
