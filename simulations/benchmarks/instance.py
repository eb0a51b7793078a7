# SPDX-License-Identifier: Apache-2.0
"""FedIns and SSF: what is exact about them, and how many values they have."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from coordinator.bundles import sign_bundle
from coordinator.job import Job
from coordinator.journal import Journal
from coordinator.sections import (
    BackboneSection,
    DataSection,
    JobSection,
    MethodSpec,
    RoundsSection,
    SimulationSection,
    TrainingSection,
)
from edge_runtime import open_bundle
from edge_runtime.adapter import Adapter
from edge_runtime.bundle import Bundle
from edge_runtime.predictor import Predictor
from protocol.files import INITIAL_FILE
from protocol.signing import new_key
from protocol.tensors import Tensors
from simulations.backends.play import play
from simulations.benchmarks.figure import Figure, figure
from simulations.benchmarks.parity import largest_difference
from simulations.benchmarks.runs import signed_bundle
from simulations.progress import ProgressListener
from simulations.setup import Setup, set_up
from tuning.backbones import load_backbone
from tuning.inference import save_predict_weights
from tuning.methods import method_named

POOL: Final[Mapping[str, Any]] = {"elements": 25, "selected": 3}
ONE: Final[Mapping[str, Any]] = {"elements": 1, "selected": 1, "key_weight": 0.0}
IMAGES: Final = 48
SIZES: Final = (1, 2, 7)
STIRRED: Final = 0.1  # standard deviation of what is added to initial tensors, as training would


def make_job(
    method: str, settings: Mapping[str, Any], backbone: Path | None = None, **sections: Any
) -> Job:
    """A few clients with digits; the shipped ViT without a folder as `backbone`."""
    given = {
        "data": DataSection(
            dataset="digits", clients=4, samples_per_client=24, max_test_samples=IMAGES
        ),
        "training": TrainingSection(learning_rate=0.05, batch_size=8),
        "simulation": SimulationSection(backend="sequential"),
        "rounds": RoundsSection(count=3, evaluate_every=3),
        **sections,
    }
    return Job(
        job=JobSection(name=f"instance-{method}"),
        backbone=BackboneSection(name="", path=str(backbone)) if backbone else BackboneSection(),
        method=MethodSpec(name=method, settings=settings),
        **given,
    )


def stirred(bundle: Bundle) -> dict[str, np.ndarray]:
    """Tensors that are no longer the initial ones: elements and images tell themselves apart."""
    rng = np.random.default_rng(1)
    return {
        name: value + STIRRED * rng.standard_normal(value.shape, dtype=np.float32)
        for name, value in sorted(bundle.initial().items())
    }


def batch_invariance(progress: ProgressListener, *, backbone: Path | None = None) -> Figure:
    """`batch_invariance`: an image's logits in batches of other sizes and among other images."""
    progress.stage("instance: compiling FedIns")
    setup = set_up(make_job("fedins", POOL, backbone), progress)
    images = setup.dataset.test["images"]
    with tempfile.TemporaryDirectory() as folder:
        bundle = signed_bundle(setup, Path(folder))
        predictor = Predictor(bundle)
        predictor.use(Adapter(tensors=stirred(bundle)))

        def logits(order: np.ndarray, size: int) -> np.ndarray:
            parts = [order[at : at + size] for at in range(0, len(order), size)]
            return np.concatenate([predictor.predict(images[part]).logits for part in parts])

        rows = np.arange(len(images))
        whole = logits(rows, len(rows))
        worst = max(float(np.abs(logits(rows, size) - whole).max()) for size in SIZES)
        for seed in range(3):
            order = np.random.default_rng(seed).permutation(len(rows))
            among_others = logits(order, 8)
            worst = max(worst, float(np.abs(among_others - whole[order]).max()))
    sizes = ", ".join(map(str, SIZES))
    return figure(
        "batch_invariance",
        worst,
        target="<= 1e-5",
        note=f"{len(rows)} images at once beside batches of {sizes}, and of 8 in three other "
        f"orders; logits up to {np.abs(whole).max():.1f}",
    )


def pool_of_one(progress: ProgressListener, *, backbone: Path | None = None) -> Figure:
    """`pool_of_one`: a pool of one element beside plain SSF, from the same start by FedAvg."""
    ssf = set_up(make_job("ssf", {}, backbone), progress)
    pool = set_up(make_job("fedins", ONE, backbone), progress)
    progress.stage("instance: a pool of one beside SSF")
    with tempfile.TemporaryDirectory() as folder:
        plain = signed_bundle(ssf, Path(folder) / "ssf")
        pooled = signed_bundle(pool, Path(folder) / "pool")
        start = plain.initial()
        _, tuned = ssf.recipe.build()
        # In the order of the network, which is that of a pool's row.
        places = [name for name in tuned.trainable if name.endswith((".scale", ".shift"))]
        same_start = _as_pool(start, places) | {"keys": pooled.initial()["keys"]}
        moved = _played(ssf, plain)
        found = _played(pool, _starting_from(same_start, pooled))
    alike = {name: value for name, value in found.items() if name != "keys"}
    return figure(
        "pool_of_one",
        largest_difference(_as_pool(moved, places), alike),
        target="<= 1e-5",
        note=f"{ssf.job.rounds.count} rounds of {len(ssf.federation.clients)} clients, in which "
        f"tensors moved by up to {largest_difference(moved, start):.2g}",
    )


def _as_pool(tensors: Tensors, places: Sequence[str]) -> dict[str, np.ndarray]:
    """SSF's tensors as those of a pool of one, keys aside."""
    return {
        "pool": np.concatenate([tensors[name] for name in places])[None],
        "classifier.weight": tensors["classifier.weight"][None],
        "classifier.bias": tensors["classifier.bias"][None],
    }


def _starting_from(tensors: Tensors, bundle: Bundle) -> Bundle:
    """The bundle with other initial tensors, signed anew."""
    from safetensors.numpy import save_file

    owned = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    save_file(owned, bundle.folder / INITIAL_FILE)
    sign_bundle(bundle.manifest, new_key(), bundle.folder)
    return open_bundle(bundle.folder, public_key=None)


def _played(setup: Setup, bundle: Bundle) -> Tensors:
    run = bundle.folder.parent
    with Journal(run / "journal.sqlite") as journal:
        return play(setup, bundle, run, journal, lambda _: None).tensors


def folded_ssf(progress: ProgressListener, *, backbone: Path | None = None) -> Figure:
    """`folded_ssf`: scales and shifts merged into the weights beside those that are not."""
    progress.stage("instance: folded SSF")
    ssf = set_up(make_job("ssf", {}, backbone), progress)
    head = set_up(make_job("head", {}, backbone), progress)
    with tempfile.TemporaryDirectory() as folder:
        bundle = signed_bundle(ssf, Path(folder))
        tensors = stirred(bundle)
        _, tuned = ssf.recipe.build()
        save_predict_weights(tuned, tensors, bundle.folder)
        images = ssf.dataset.test["images"]
        predictor = Predictor(bundle)
        folded = predictor.predict(images).logits
        predictor.use(Adapter(tensors=tensors))
        loose = predictor.predict(images).logits
        nodes = [_nodes(place / "predict.onnx") for place in (bundle.folder, head.compiled.folder)]
    made = figure(
        "folded_ssf",
        float(np.abs(folded - loose).max()),
        target="<= 1e-4",
        note=f"{nodes[0]} nodes, the backbone alone has {nodes[1]}; logits up to "
        f"{np.abs(loose).max():.1f}",
    )
    # The promise is the backbone's own graph, too.
    return made if nodes[0] == nodes[1] else replace(made, holds=False)


def _nodes(path: Path) -> int:
    import onnx

    return len(onnx.load(path, load_external_data=False).graph.node)


def parameters(progress: ProgressListener) -> list[Figure]:
    """`ssf_parameters` and `pool_parameters`: counts on ViT-B/16 beside the papers'."""
    progress.stage("instance: counting on ViT-B/16")
    ssf, _ = _counts("ssf", {}, 100)
    bare = ssf - 100 * (768 + 1)
    pools = {classes: _counts("fedins", POOL, classes) for classes in (100, 200)}
    shares = {classes: added / every for classes, (added, every) in pools.items()}
    of_ssf = figure(
        "ssf_parameters",
        bare,
        target="== 205824",
        note=f"ViT-B/16 without its classifier; {ssf:,} with one of 100 classes, expected 282,724",
    )
    of_pool = figure(
        "pool_parameters",
        pools[100][0],
        target="== 7087300",
        note=f"ViT-B/16, 100 classes; {pools[200][0]:,} with 200, expected 9,009,800; "
        f"{shares[100]:.1%} and {shares[200]:.1%} of the traffic of the whole model, which the "
        "paper puts below 15 %",
    )
    both = pools[200][0] == 9_009_800 and max(shares.values()) < 0.15
    return [
        of_ssf if ssf == 282_724 else replace(of_ssf, holds=False),
        of_pool if both else replace(of_pool, holds=False),
    ]


def _counts(method: str, settings: Mapping[str, Any], classes: int) -> tuple[int, int]:
    """Trained values of a method on ViT-B/16, and all values of that network, without memory."""
    import torch
    from transformers import ViTConfig

    with tempfile.TemporaryDirectory() as folder, torch.device("meta"):
        ViTConfig().save_pretrained(folder)
        backbone = load_backbone(Path(folder), classes=classes, seed=0, random_weights=True)
        every = sum(value.numel() for value in backbone.model.parameters())
        tuned = method_named(method, settings).attach(backbone, seed=0)
    return sum(value.numel() for value in tuned.parameters().values()), every
