# SPDX-License-Identifier: Apache-2.0
"""Seconds of a prediction: with elements chosen for each image, and after switching adapters."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np

from coordinator.bundles import recipe_of, write_bundle
from edge_runtime import open_bundle, preprocess
from edge_runtime.adapter import Adapter
from edge_runtime.bundle import Bundle
from edge_runtime.predictor import Predictor
from protocol.signing import new_key
from simulations.benchmarks.device_step import CLASSES, save_vit_base
from simulations.benchmarks.figure import Figure, figure
from simulations.benchmarks.instance import POOL, make_job, stirred
from simulations.progress import ProgressListener
from tuning.compiler import compile_recipe

THREADS: Final = 2
WITH_QUERY: Final = 2.1
KNOWN_QUERY: Final = 1.15


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Medians over pairs that ran side by side."""

    plain_s: float
    with_query: float  # times the plain forward pass
    known_query: float

    @property
    def holds(self) -> bool:
        """Both bounds are kept."""
        return self.with_query <= WITH_QUERY and self.known_query <= KNOWN_QUERY

    def words(self, name: str) -> str:
        """For a figure's note."""
        return (
            f"{name}: {self.with_query:.2f} with the query branch, {self.known_query:.2f} with "
            f"known features, of {1000 * self.plain_s:.1f} ms"
        )


def instance_latency_ratio(
    progress: ProgressListener,
    *,
    repetitions: int = 15,
    images: int = 64,
    backbone: Path | None = None,
    base: bool = True,
    settings: Mapping[str, Any] = POOL,
) -> Figure:
    """`instance_latency_ratio`: FedIns beside the backbone alone, one image of ViT-B/16 at a time.

    The small ViT, `images` at a time, is told beside it, and alone without `base`: with 128
    features its layers cost little more than what is done to them.
    """
    small = latency(progress, "small ViT", backbone, images, 2 * repetitions, settings)
    words = [small.words(f"small ViT, {images} at once")]
    decides = small
    if base:
        with tempfile.TemporaryDirectory() as folder:
            model = save_vit_base(Path(folder) / "vit-base")
            # Of the large model nothing should stay behind in the user's cache.
            cache = Path(folder) / "cache"
            decides = latency(progress, "ViT-B/16", model, 1, repetitions, settings, cache)
        words.insert(0, decides.words("ViT-B/16, one at a time"))
    made = figure(
        "instance_latency_ratio",
        decides.with_query,
        target=f"<= {WITH_QUERY}",
        note=f"{'; '.join(words)}; {THREADS} threads; known features at most {KNOWN_QUERY}",
    )
    return replace(made, holds=decides.holds)


def latency(
    progress: ProgressListener,
    name: str,
    backbone: Path | None,
    images: int,
    repetitions: int,
    settings: Mapping[str, Any],
    cache: Path | None = None,
) -> Timing:
    """Time a plain forward pass and FedIns on the same images, in turns after one of each."""
    with tempfile.TemporaryDirectory() as folder:
        progress.stage(f"instance: compiling {name}")
        plain = _bundle("head", {}, backbone, Path(folder) / "head", cache)
        pool = _bundle("fedins", settings, backbone, Path(folder) / "pool", cache)
        alone = Predictor(plain, threads=THREADS)
        chosen = Predictor(pool, threads=THREADS)
        chosen.use(Adapter(tensors=stirred(pool)))
        batch = _noise(pool, images)
        features = chosen.features(batch)
        ways: dict[str, Callable[[], object]] = {
            "plain": lambda: alone.predict(batch),
            "query": lambda: chosen.predict(batch),
            "known": lambda: chosen.predict(batch, features=features),
        }
        taken: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(repetitions + 1):
            progress.stage(f"instance: {name} {number}/{repetitions}")
            for way, run in ways.items():
                seconds = _seconds(run)
                if number:
                    taken[way].append(seconds)

    def ratio(way: str) -> float:
        return median(one / other for one, other in zip(taken[way], taken["plain"], strict=True))

    return Timing(
        plain_s=median(taken["plain"]), with_query=ratio("query"), known_query=ratio("known")
    )


def adapter_switch_ratio(
    progress: ProgressListener, *, repetitions: int = 15, backbone: Path | None = None
) -> Figure:
    """`adapter_switch_ratio`: putting an adapter into a loaded bundle beside loading the bundle.

    The small ViT with LoRA. Loading verifies every byte, as a device does, and ends with the first
    logits of one image; what such a prediction takes by itself is taken off.
    """
    progress.stage("instance: switching adapters")
    with tempfile.TemporaryDirectory() as folder:
        bundle = _bundle("lora", {"rank": 4}, backbone, Path(folder) / "lora", None)
        adapters = [Adapter(tensors=stirred(bundle)), Adapter(tensors=bundle.initial())]
        batch = _noise(bundle, 1)
        kept = Predictor(bundle, threads=THREADS)

        def load() -> None:
            fresh = Predictor(
                open_bundle(bundle.folder, public_key=bundle.public_key), threads=THREADS
            )
            fresh.use(adapters[0])
            fresh.predict(batch)

        taken: list[tuple[float, float]] = []
        for number in range(repetitions + 1):
            kept.use(adapters[0])
            kept.predict(batch)
            switched = _seconds(lambda: kept.use(adapters[1]))
            predicted = _seconds(lambda: kept.predict(batch))
            loaded = _seconds(load) - predicted
            if number:
                taken.append((switched, loaded))
    switch_s, load_s = (median(values) for values in zip(*taken, strict=True))
    return figure(
        "adapter_switch_ratio",
        median(one / other for one, other in taken),
        target="<= 0.05",
        note=f"{1000 * switch_s:.2f} ms beside {1000 * load_s:.0f} ms",
    )


def _bundle(
    method: str,
    settings: Mapping[str, Any],
    backbone: Path | None,
    folder: Path,
    cache: Path | None,
) -> Bundle:
    job = make_job(method, settings, backbone)
    recipe = recipe_of(job, CLASSES)
    names = [str(number) for number in range(CLASSES)]
    compiled = compile_recipe(recipe, cache)
    return open_bundle(
        write_bundle(job, recipe, compiled, names, new_key(), folder), public_key=None
    )


def _noise(bundle: Bundle, count: int) -> dict[str, np.ndarray]:
    """Model inputs: what an image shows does not matter to the time it takes."""
    rng = np.random.default_rng(0)
    settings = bundle.manifest.preprocessing
    shape = (count, settings.size, settings.size, settings.channels)
    return preprocess(settings, {"images": rng.integers(0, 256, shape, dtype=np.uint8)})


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
