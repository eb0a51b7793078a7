# SPDX-License-Identifier: Apache-2.0
"""From a job to all that a run needs: data, clients, compiled step. Nothing is trained here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from coordinator.bundles import recipe_of
from coordinator.job import Job
from edge_runtime.split_trainer import kept_count
from simulations.clients import Federation, make_clients
from simulations.datasets import Dataset, load_dataset, tokenise
from simulations.errors import DataError
from simulations.progress import ProgressListener
from tuning.backbones import backbone_folder, backbone_kind
from tuning.compiler import Compiled, compile_recipe
from tuning.recipe import Recipe
from tuning.split_compiler import SplitCompiled, compile_split


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A job with its data and its compiled step."""

    job: Job
    dataset: Dataset
    federation: Federation
    recipe: Recipe
    compiled: Compiled
    split: SplitCompiled | None = None
    """Both sides of a network that is trained split; `compiled` is then the device's."""


def load_job_data(job: Job) -> Dataset:
    """The job's data set, as token ids where it holds texts.

    Raises:
        BackboneError: the backbone is unknown, or its folder has no configuration.
        DataError: the data set is missing, broken, or not of the kind that the backbone reads;
            or the job is one for devices that have data nobody else has.
    """
    data = job.data
    if data.classes:
        raise DataError(
            f'data.classes = "{data.classes}": expected nothing in a simulation, whose data set '
            "says what its classes are; with it a job is for a deployment"
        )
    dataset = load_dataset(
        data.dataset,
        seed=job.job.seed,
        max_train=data.max_train_samples,
        max_test=data.max_test_samples,
    )
    folder = Path(job.backbone.path) if job.backbone.path else backbone_folder(job.backbone.name)
    reads = backbone_kind(folder)
    if reads != dataset.kind:
        raise DataError(
            f"backbone {job.backbone.path or job.backbone.name} reads {reads}s, but the data set "
            f"{dataset.name} holds {dataset.kind}s; choose a backbone or a data set that fits"
        )
    if dataset.kind == "text":
        dataset = tokenise(dataset, folder, data.max_length)
    return dataset


def set_up(job: Job, progress: ProgressListener) -> Setup:
    """Load the data, deal them to clients, compile the step.

    Raises:
        DataError, PartitionError: the data are missing, broken, or cannot be dealt out like this.
        BackboneError, MethodError, CompileError: as `tuning.compiler.compile_recipe`.
    Of a job with private samples no client may be too small to take part in any round.
    """
    progress.stage(f"loading {job.data.dataset}")
    dataset = load_job_data(job)
    federation = make_clients(
        dataset,
        job.data.partition,
        job.data.clients,
        held_out=job.data.held_out,
        samples_per_client=job.data.samples_per_client,
        validation=job.data.validation,
        seed=job.job.seed,
    )
    recipe = recipe_of(job, len(dataset.class_names))
    _require_eligible(job, federation)
    progress.stage("compiling the training step")
    split = compile_split(recipe, lanes=job.split.lanes) if job.is_split else None
    compiled = split.device if split else compile_recipe(recipe)
    return Setup(
        job=job,
        dataset=dataset,
        federation=federation,
        recipe=recipe,
        compiled=compiled,
        split=split,
    )


def example_notes(setup: Setup) -> tuple[str, ...]:
    """What there is to say of the privacy of single samples beside its figures."""
    privacy = setup.recipe.training.privacy
    if privacy is None:
        return ()
    counts = {client.id: len(client.fit["labels"]) for client in setup.federation.clients}
    small = sorted(name for name, count in counts.items() if count < privacy.fewest_samples)
    notes = [
        "privacy of samples: a simulation draws batches and noise from the job's seed, so that it "
        "can be repeated; the guarantee is that of the same job on devices, whose draws are secret"
    ]
    if small:
        notes.append(
            f"privacy of samples: {len(small)} clients hold fewer than rounds.min_samples = "
            f"{privacy.fewest_samples} samples and take no part: {', '.join(small)}"
        )
    return tuple(notes)


def passes_per_round(setup: Setup) -> float:
    """How often a round trains on each sample of the clients that take part, on average.

    Of a split network, through the body.
    """
    training = setup.job.training
    most = training.local_steps * training.batch_size or math.inf
    held, kept = _held_and_kept(setup)
    if setup.recipe.training.privacy is not None:
        # A step draws a batch on average, however many samples there are.
        return most * len(held) / sum(held)
    return sum(min(count * training.local_epochs, most) for count in kept) / sum(held)


def local_passes_per_round(setup: Setup) -> float:
    """Of a split network, how often with the body skipped; elsewhere 0."""
    if setup.split is None:
        return 0.0
    section = setup.job.split
    held, kept = _held_and_kept(setup)
    scoring = section.scoring_epochs if section.prunes else 0
    return scoring + section.local_epochs * sum(kept) / sum(held)


def client_flops(setup: Setup, samples: int) -> int:
    """Operations of clients on so many samples, forward and backward, in all passes of a round."""
    batch = setup.recipe.training.batch_size
    through = setup.compiled.step_flops * passes_per_round(setup)
    if setup.split is None:
        return round(samples * through / batch)
    flops, section = setup.split.flops, setup.job.split
    scores = flops.scores if section.prunes else 0
    local = flops.local * local_passes_per_round(setup)
    return round(samples * (scores + local + through) / batch)


def _held_and_kept(setup: Setup) -> tuple[list[int], list[int]]:
    """Samples of each client, and those of them that it trains on."""
    held = [len(client.fit["labels"]) for client in setup.federation.clients]
    if setup.split is None:
        return held, held
    section = setup.job.split
    return held, [kept_count(count, section.keep, section.drop) for count in held]


def _require_eligible(job: Job, federation: Federation) -> None:
    """Enough clients hold what their samples' privacy is accounted for, or a round would wait."""
    if not job.example_privacy.is_private:
        return
    largest = sorted((len(client.fit["labels"]) for client in federation.clients), reverse=True)
    needed = max(job.rounds.min_clients, 1)
    if sum(count >= job.rounds.min_samples for count in largest) < needed:
        raise DataError(
            f"rounds.min_samples = {job.rounds.min_samples}: expected {needed} or more clients "
            f"that hold so many samples, as their privacy is accounted for; the largest hold "
            f"{', '.join(map(str, largest[:needed]))}"
        )
