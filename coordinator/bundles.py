# SPDX-License-Identifier: Apache-2.0
"""From a job to its signed bundle: compiled by `tuning`, described and signed here."""

from __future__ import annotations

import dataclasses
import fnmatch
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from coordinator.errors import Fault, JobError
from coordinator.job import Job
from coordinator.privacy import Privacy
from protocol.client_noise import ClientNoise
from protocol.example_privacy import ExamplePrivacy
from protocol.files import (
    MANIFEST_NAME,
    SIGNATURE_NAME,
    SIGNER_NAME,
    TOKENIZER_FILE,
    TOKENIZER_SETTINGS,
)
from protocol.manifest import Manifest, TrainingSpec, hash_files
from protocol.signing import public_key_hex, sign
from protocol.split import SplitSpec
from protocol.tensors import ParamSpec
from tuning.backbones import backbone_folder
from tuning.compiler import Compiled
from tuning.recipe import Recipe
from tuning.split_compiler import SplitCompiled

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


def recipe_of(job: Job, classes: int) -> Recipe:
    """What of a job decides the compiled step, for data of `classes` classes."""
    training = job.training
    return Recipe(
        backbone=Path(job.backbone.path) if job.backbone.path else job.backbone.name,
        classes=classes,
        seed=job.job.seed,
        method=job.method.name,
        settings=job.method.settings,
        training=TrainingSpec(
            batch_size=training.batch_size,
            optimizer=training.optimizer,  # type: ignore[arg-type]
            learning_rate=training.learning_rate,
            weight_decay=training.weight_decay,
            momentum=training.momentum,
            proximal=training.proximal,
            scaffold=training.scaffold,
            local_epochs=training.local_epochs,
            privacy=_example_privacy(job),
        ),
        max_length=job.data.max_length,
        random_weights=job.backbone.random_weights,
    )


def _example_privacy(job: Job) -> ExamplePrivacy | None:
    """What a device may be asked for at most, where training is private."""
    section = job.example_privacy
    if not section.is_private:
        return None
    return ExamplePrivacy(
        noise_multiplier=section.noise_multiplier,
        clip=section.clip,
        fewest_samples=job.rounds.min_samples,
        steps=job.training.local_steps,
        rounds=job.rounds.count,
    )


def _client_noise(job: Job, privacy: Privacy | None) -> ClientNoise | None:
    """What a device is to add itself, and no less, where clients add the noise."""
    if privacy is None or not privacy.share:
        return None
    section = job.privacy
    return ClientNoise(
        multiplier=privacy.share,
        clip=section.clip,
        rounds=job.rounds.count,
        fewest=section.min_survivors if section.secure_aggregation else 0,
    )


def write_bundle(
    job: Job,
    recipe: Recipe,
    compiled: Compiled,
    class_names: Sequence[str],
    key: Ed25519PrivateKey,
    folder: Path,
    *,
    split: SplitSpec | None = None,
) -> Path:
    """Copy a compiled job into `folder`, describe it and sign it.

    A text backbone's tokenizer comes along, so that devices need only texts. With `split` it is
    the device's side of a network whose body stays with the server.
    """
    privacy = Privacy.of(job)
    folder.mkdir(parents=True, exist_ok=True)
    for name in compiled.files():
        shutil.copyfile(compiled.folder / name, folder / name)
    if compiled.preprocessing.kind == "tokens":
        _copy_tokenizer(recipe, folder)
    manifest = Manifest(
        job=job.hash(),
        backbone=compiled.backbone,
        method=job.method.name,
        task="classification",
        class_names=tuple(class_names),
        trainable=compiled.trainable,
        state=compiled.state,
        pairs=compiled.pairs,
        personal=personal_tensors(job, compiled.trainable),
        split=split,
        noise=_client_noise(job, privacy),
        fewest_samples=None if job.tells_samples else job.rounds.min_samples,
        inputs=compiled.inputs,
        preprocessing=compiled.preprocessing,
        training=recipe.training,
        graphs=compiled.graphs,
    )
    sign_bundle(manifest, key, folder)
    return folder


def _copy_tokenizer(recipe: Recipe, folder: Path) -> None:
    """What there is of it: a backbone without one takes tokens alone."""
    own = recipe.backbone
    source = own if isinstance(own, Path) else backbone_folder(own)
    for name in (TOKENIZER_FILE, TOKENIZER_SETTINGS):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def split_spec(job: Job, compiled: SplitCompiled) -> SplitSpec:
    """What a job says of the phases of a round, and its compiled form of what crosses the cut."""
    section = job.split
    tokens, width = compiled.entering.shape
    return SplitSpec(
        entering_tokens=tokens,
        leaving_tokens=compiled.leaving.shape[0],
        width=width,
        masked=compiled.masked,
        keep=section.keep,
        drop=section.drop,
        scoring_epochs=section.scoring_epochs,
        local_epochs=section.local_epochs,
        noise=section.noise,
        form=section.form,
        lanes=section.lanes,
    )


def personal_tensors(job: Job, trainable: ParamSpec) -> tuple[str, ...]:
    """The tensors that clients keep for themselves. Raises: JobError for a pattern of none."""
    kept: set[str] = set()
    for pattern in job.personal.patterns:
        found = fnmatch.filter(trainable.names, pattern)
        if not found:
            names = ", ".join(trainable.names[:5]) + ("..." if len(trainable.names) > 5 else "")
            allowed = f'expected patterns of trainable tensors, "{pattern}" is none of {names}'
            raise JobError([Fault(key="personal.tensors", value=pattern, allowed=allowed)])
        kept.update(found)
    if len(kept) == len(trainable.names):
        allowed = "expected patterns that leave a tensor to share, these leave none"
        value = job.personal.tensors
        raise JobError([Fault(key="personal.tensors", value=value, allowed=allowed)])
    return tuple(sorted(kept))


def sign_bundle(manifest: Manifest, key: Ed25519PrivateKey, folder: Path) -> None:
    """Take the files as they now are into the manifest, and sign it."""
    raw = dataclasses.replace(manifest, files=hash_files(folder)).to_json()
    (folder / MANIFEST_NAME).write_bytes(raw)
    (folder / SIGNATURE_NAME).write_bytes(sign(raw, key))
    (folder / SIGNER_NAME).write_text(public_key_hex(key) + "\n", encoding="ascii")
