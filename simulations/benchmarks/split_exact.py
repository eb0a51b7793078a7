# SPDX-License-Identifier: Apache-2.0
"""What is exact about split training: every cut against the whole, and two known identities."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from coordinator.job import Job
from coordinator.sections import (
    BackboneSection,
    DataSection,
    JobSection,
    MethodSpec,
    RoundsSection,
    SimulationSection,
    SplitSection,
    TrainingSection,
)
from edge_runtime import batch_plan, preprocess
from simulations.backends.split import LocalBodies
from simulations.benchmarks.figure import Figure, figure
from simulations.benchmarks.parity import largest_difference
from simulations.benchmarks.runs import on, signed_bundle
from simulations.progress import ProgressListener, SilentProgress
from simulations.setup import Setup, set_up
from tuning.backbones import Backbone, load_backbone
from tuning.cuts import Cut, cut_network
from tuning.split_learning import handed_over, split_round
from tuning.step import cross_entropies

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]

BLOCKS: Final = 4
CLASSES: Final = 3
ROWS: Final = 6
LENGTH: Final = 8


def networks(folder: Path) -> dict[str, tuple[Backbone, dict[str, torch.Tensor]]]:
    """A small network of each family with random weights, and a batch for it."""
    import torch
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        LlamaConfig,
        LlamaForSequenceClassification,
        ViTConfig,
        ViTForImageClassification,
    )
    from transformers.utils import logging

    small = {
        "hidden_size": 32,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    words = {**small, "vocab_size": 50, "max_position_embeddings": LENGTH, "pad_token_id": 0}
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(ROWS, 1, 1, LENGTH)
    mask[::2, ..., LENGTH // 2 :] = -10_000.0
    texts = {
        "input_ids": torch.randint(1, 50, (ROWS, LENGTH), generator=generator),
        "attention_mask": mask,
    }
    images = {"pixel_values": torch.randn(ROWS, 1, 16, 16, generator=generator)}
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    made = {}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            models: dict[str, Any] = {
                "ViT": ViTForImageClassification(
                    ViTConfig(image_size=16, patch_size=4, num_channels=1, **small)
                ),
                "BERT": BertForSequenceClassification(BertConfig(**words)),
                "LLaMA": LlamaForSequenceClassification(LlamaConfig(**words)),
            }
        for name, model in models.items():
            model.save_pretrained(folder / name)
            backbone = load_backbone(folder / name, classes=CLASSES, seed=0, max_length=LENGTH)
            made[name] = (backbone, images if name == "ViT" else texts)
    finally:
        if shown:
            logging.enable_progress_bar()
    return made


def split_parity(progress: ProgressListener) -> Figure:
    """`split_parity`: loss and all gradients, of every cut, beside the whole network: between the
    parts go hidden states and gradients as values, as over a stream."""
    import torch

    progress.stage("split: every cut against the whole network")
    worst: dict[str, float] = {}
    cuts = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, (backbone, batch) in networks(Path(folder)).items():
            labels = torch.arange(ROWS) % CLASSES
            parameters = dict(backbone.model.named_parameters())
            whole = _found(backbone.model(**batch).logits, labels, parameters)
            weights = {key: value.detach() for key, value in parameters.items()}
            for head in range(BLOCKS):
                for tail in range(BLOCKS - head):
                    assert backbone.family is not None
                    parts = cut_network(
                        backbone.model,
                        backbone.family,
                        backbone.classifier,
                        Cut(head=head, tail=tail),
                    )
                    gradients, loss, _ = handed_over(parts, weights, batch, labels)
                    apart = _apart(whole, {**gradients, "loss": loss})
                    worst[name] = max(worst.get(name, 0.0), apart)
                    cuts += 1
    words = ", ".join(f"{name} {value:.1e}" for name, value in worst.items())
    return figure(
        "split_parity",
        max(worst.values()),
        target="<= 1e-5",
        note=f"{cuts} cuts of networks of {BLOCKS} blocks: {words}",
    )


def plain_split_parity(progress: ProgressListener, backbone: Path | None = None) -> Figure:
    """`plain_split_parity`: SFPrompt without its phases beside U-shaped split learning with a
    frozen body, and SplitFed v1 beside federated averaging: largest difference of any weight."""
    progress.stage("split: SFPrompt without its phases against a plain loop")
    apart = unphased_apart(backbone)
    progress.stage("split: SplitFed v1 against federated averaging")
    apart["SplitFed v1"] = splitfed_apart()
    words = ", ".join(f"{what} {value:.1e}" for what, value in apart.items())
    return figure(
        "plain_split_parity",
        max(apart.values()),
        target="<= 1e-5",
        note=f"U = 0 and all samples kept, small ViT: {words}",
    )


def unphased_apart(backbone: Path | None = None) -> dict[str, float]:
    """After a round of one client through the device's graphs, by what computes the body."""
    job = split_job(backbone, cut="1+1" if backbone is None else "1+0", optimizer="sgd")
    setup = set_up(job, SilentProgress())
    with tempfile.TemporaryDirectory() as folder:
        bundle = signed_bundle(setup, Path(folder))
        data = preprocess(bundle.manifest.preprocessing, setup.federation.clients[0].fit)
        start = bundle.initial()
        expected = plainly(setup, start, data)
        found = {}
        for engine in ("onnx", "torch"):
            with LocalBodies(on(setup, "sequential", engine), bundle) as bodies:
                trained, _ = bodies.tester().fit(
                    start, data, learning_rate=job.training.learning_rate, epochs=1, seed=0
                )
            found[f"{engine} body"] = largest_difference(trained, expected)
    return found


def plainly(
    setup: Setup, start: Mapping[str, np.ndarray], data: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The whole network, autograd and torch.optim; head and body are frozen."""
    import torch

    spec = setup.recipe.training
    _, tuned = setup.recipe.build()
    inside = dict(tuned.module.named_parameters())
    for parameter in inside.values():
        parameter.requires_grad_(False)
    trained = {name: inside[tuned.trainable[name]] for name in start}
    for name, parameter in trained.items():
        parameter.data = torch.from_numpy(start[name].copy())
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(trained.values(), lr=spec.learning_rate, momentum=spec.momentum)
    rng = np.random.default_rng(0)
    order, weights = batch_plan(len(data["labels"]), spec.batch_size, 1, rng)
    for rows, weight in zip(order, weights, strict=True):
        rows = rows[weight > 0]
        batch = {n: torch.from_numpy(v[rows]) for n, v in data.items() if n != "labels"}
        optimizer.zero_grad()
        logits = tuned.module(**tuned.prepare(batch)).logits
        cross_entropies(logits, torch.from_numpy(data["labels"][rows])).mean().backward()
        optimizer.step()
    return {name: parameter.detach().numpy() for name, parameter in trained.items()}


def split_job(
    backbone: Path | None = None,
    *,
    cut: str = "private",
    optimizer: str = "adamw",
    batch: int = 8,
    clients: int = 2,
    samples: int = 30,
) -> Job:
    """A few clients with digits; the shipped ViT without a folder as `backbone`."""
    sgd = optimizer == "sgd"
    return Job(
        job=JobSection(name="split"),
        backbone=BackboneSection(name="", path=str(backbone)) if backbone else BackboneSection(),
        data=DataSection(
            dataset="digits",
            clients=clients,
            samples_per_client=samples,
            held_out=0.0,
            max_test_samples=40,
        ),
        method=MethodSpec(name="sfprompt", settings={"cut": cut, "length": 4}),
        training=TrainingSection(
            optimizer=optimizer,
            learning_rate=0.05 if sgd else 1e-3,
            momentum=0.9 if sgd else 0.0,
            batch_size=batch,
        ),
        split=SplitSection(keep=1.0, local_epochs=0),
        rounds=RoundsSection(count=1),
        simulation=SimulationSection(backend="sequential"),
    )


def splitfed_apart(rate: float = 0.05, momentum: float = 0.9) -> float:
    """Largest difference of any weight after a round of three clients."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        backbone, _ = networks(Path(folder))["ViT"]
    generator = torch.Generator().manual_seed(1)
    clients = [
        [
            (
                {"pixel_values": torch.randn(4, 1, 16, 16, generator=generator)},
                torch.randint(0, CLASSES, (4,), generator=generator),
            )
            for _ in range(batches)
        ]
        for batches in (3, 1, 2)
    ]
    model = backbone.model
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    assert backbone.family is not None
    parts = cut_network(model, backbone.family, backbone.classifier, Cut(head=1, tail=0))
    found = split_round(parts, start, clients, "splitfed-v1", rate=rate, momentum=momentum).weights
    mean: Tensors = {name: torch.zeros_like(value) for name, value in start.items()}
    for batches in clients:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(start[name])
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)
        for batch, labels in batches:
            optimizer.zero_grad()
            cross_entropies(model(**batch).logits, labels).mean().backward()
            optimizer.step()
        for name, parameter in model.named_parameters():
            mean[name] += len(batches) / 6 * parameter.detach()
    return max(float((found[name] - value).abs().max()) for name, value in mean.items())


def _found(
    logits: torch.Tensor, labels: torch.Tensor, parameters: Mapping[str, torch.Tensor]
) -> Tensors:
    """The loss, and its gradient of every parameter that has one."""
    import torch

    loss = cross_entropies(logits, labels).mean()
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    named = zip(parameters, gradients, strict=True)
    return {"loss": loss.detach()} | {n: g for n, g in named if g is not None}


def _apart(one: Tensors, other: Tensors) -> float:
    if one.keys() != other.keys():
        return math.inf
    return max(float((value - other[name]).abs().max()) for name, value in one.items())
