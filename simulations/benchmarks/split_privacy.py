# SPDX-License-Identifier: Apache-2.0
"""What hidden states at a cut give away of the images: reconstructions by who knows the head.

Two attackers, both with the public weights of the head. One solves the patch embedding for its
patches, which is exact where a cut is right behind it and the embedding is not narrower than a
patch. The other has images of its own, puts them through the head, and learns the way back by
ridge regression. Neither is the strongest that there may be: what they find is the least that a
cut gives away, and what they do not find is no guarantee.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from edge_runtime import preprocess
from edge_runtime.split_trainer import noised
from simulations.benchmarks.figure import Figure, figure
from simulations.datasets.fashion_mnist import load_fashion_mnist
from simulations.progress import ProgressListener
from tuning.backbones import load_backbone
from tuning.backbones.backbone import SHIPPED_VIT
from tuning.methods import method_named

CUTS: Final = ("faithful-minimal", "private")
NOISES: Final = (0.0, 0.5, 1.0, 2.0)
RIDGE: Final = 1e-3  # of the mean square of a feature
CHUNK: Final = 500


class Head:
    """The device's part of a cut, as an attacker has it."""

    def __init__(self, cut: str, backbone: str | Path = SHIPPED_VIT) -> None:
        self.backbone = load_backbone(backbone, classes=10, seed=0)
        method = method_named("sfprompt", {"cut": cut, "length": 10})
        self.tuned = method.attach(self.backbone, seed=0)

    def states(self, images: np.ndarray) -> np.ndarray:
        """Hidden states [n, T, D] of uint8 images [n, h, w]."""
        import torch

        from tuning.split_step import frozen_of, head_forward, of_part, parts_of

        part, tensors = parts_of(self.tuned).head, self.tuned.parameters()
        front = {name: tensors[name] for name in of_part(self.tuned, part)}
        frozen = frozen_of(self.tuned, part)
        data: Mapping[str, Any] = preprocess(
            self.backbone.preprocessing, {"images": images, "labels": np.zeros(len(images), int)}
        )
        pixels = torch.from_numpy(data["pixel_values"])
        with torch.no_grad():
            found = [
                head_forward(self.tuned, front, frozen, {"pixel_values": chunk}).numpy()
                for chunk in pixels.split(CHUNK)
            ]
        return np.concatenate(found)

    def solved(self, states: np.ndarray) -> np.ndarray:
        """Images of 0 to 1 [n, h, w] from the patch embedding alone, by least squares."""
        embeddings = self.backbone.model.vit.embeddings.base_layer
        projection = embeddings.patch_embeddings.projection
        weight = projection.weight.detach().numpy().reshape(projection.out_channels, -1)
        places = embeddings.position_embeddings.detach().numpy()[0, 1:]
        count = len(places)
        values = states[:, -count:] - places - projection.bias.detach().numpy()
        patches = values @ np.linalg.pinv(weight).T
        pre = self.backbone.preprocessing
        side = math.isqrt(count)
        patch = pre.size // side
        grid = patches.reshape(len(states), side, side, patch, patch).swapaxes(2, 3)
        images: np.ndarray = grid.reshape(len(states), pre.size, pre.size)
        return np.clip(images * pre.std[0] + pre.mean[0], 0, 1)


class Regression:
    """Ridge regression from hidden states to images, learned from an attacker's own."""

    def __init__(self, states: np.ndarray, images: np.ndarray) -> None:
        features = states.reshape(len(states), -1).astype(np.float64)
        wanted = images.reshape(len(images), -1) / 255.0
        self._centre, self._mean = features.mean(axis=0), wanted.mean(axis=0)
        features = features - self._centre
        gram = features.T @ features
        gram[np.diag_indices_from(gram)] += RIDGE * np.trace(gram) / len(gram)
        self._weights = np.linalg.solve(gram, features.T @ (wanted - self._mean))
        self._shape = images.shape[1:]

    def __call__(self, states: np.ndarray) -> np.ndarray:
        """Images of 0 to 1."""
        features = states.reshape(len(states), -1) - self._centre
        found = features @ self._weights + self._mean
        return np.clip(found, 0, 1).reshape(len(states), *self._shape)


def psnr(found: np.ndarray, images: np.ndarray) -> float:
    """Peak signal-to-noise ratio, dB, of images of 0 to 1 beside uint8 ones."""
    error = float(np.mean((found - images / 255.0) ** 2))
    return math.inf if error == 0 else -10 * math.log10(error)


def reconstruction_psnr_db(
    progress: ProgressListener, *, known: int = 12_000, attacked: int = 1_000
) -> Figure:
    """`reconstruction_psnr_db`: of private images, from what leaves the private cut without noise.

    An attacker without any hidden states, who answers with the mean image, is told beside it.
    Raises: DataError without Fashion-MNIST.
    """
    public = load_fashion_mnist(split="public")[0][:known]
    private = load_fashion_mnist(split="private")[0][:attacked]
    blind = psnr(np.broadcast_to(public.mean(axis=0) / 255.0, private.shape), private)
    best: dict[tuple[str, float], float] = {}
    for cut in CUTS:
        progress.stage(f"split: reconstructing images at the cut {cut}")
        head = Head(cut)
        mine, theirs = head.states(public), head.states(private)
        for noise in NOISES:
            rng = np.random.default_rng(0)
            sent, seen = (
                noised(states, noise, rng.standard_normal(states.shape, dtype=np.float32))
                for states in (theirs, mine)
            )
            learned = Regression(seen, public)
            ways = [psnr(learned(sent), private)]
            if cut == CUTS[0]:
                ways.append(psnr(head.solved(sent), private))
            best[cut, noise] = max(ways)
    words = [
        f"{cut}: " + ", ".join(f"{best[cut, noise]:.1f} at {noise:g}" for noise in NOISES)
        for cut in CUTS
    ]
    return figure(
        "reconstruction_psnr_db",
        best[CUTS[1], 0.0],
        unit="dB",
        note=f"private cut, no noise; by noise, {'; '.join(words)}; the mean image {blind:.1f}; "
        f"{known} public images known, {attacked} attacked",
    )
