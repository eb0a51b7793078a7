# SPDX-License-Identifier: Apache-2.0
"""From a job file to an entry in the registry, with everything compiled and signed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from coordinator.bundles import recipe_of, split_spec, write_bundle
from coordinator.deployment import Deployment
from coordinator.errors import DeploymentError
from coordinator.example_accounting import require_example_budget
from coordinator.job import Job, dump_job
from coordinator.jobs.folder import JobFolder
from coordinator.jobs.registry import JobEntry
from coordinator.privacy import Privacy
from protocol.owned_files import PARTIAL, sync_folder, write_whole

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnData:
    """What the coordinator itself knows of the data: class names, and samples if it has any."""

    name: str
    class_names: tuple[str, ...]
    test: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Raw arrays with "labels", as a device's source gives them; {} for none."""
    validation: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """`own.json`: what the figures of a finished run are made of."""

    dataset: str
    total_parameters: int
    flops_per_sample: float
    """One pass forward and backward; of a split network the device's part through the body."""
    local_flops_per_sample: float = 0.0
    """Of a split network, a pass with the body skipped."""
    score_flops_per_sample: float = 0.0


def submit(
    deployment: Deployment,
    job: Job,
    own: OwnData,
    *,
    name: str = "",
    stage: Callable[[str], None] = lambda what: None,
) -> JobEntry:
    """Compile a job, sign its bundle, and have the deployment play it.

    It is entered last and at once: a crash before leaves a folder that the next try replaces.
    `stage` is told what takes long before it begins.

    Raises: DeploymentError for a name or a job that is there already; JobError, BackboneError,
        MethodError, CompileError for what cannot be compiled, or kept private.
    """
    name = name or job.job.name
    if not _NAME.fullmatch(name):
        raise DeploymentError(
            f"name: expected up to 64 letters, digits, dots, - and _, found {name[:80]!r}"
        )
    deployment.jobs.require_new(name, job.hash())  # before minutes of compiling
    Privacy.of(job)
    require_example_budget(job)
    folder = JobFolder(deployment.jobs_folder / name)
    new = deployment.jobs_folder / f".{name}{PARTIAL}"
    for left in (folder.path, new):
        if left.exists():
            shutil.rmtree(left)
    stage("compiling the training step; the first time takes a minute")
    new.mkdir(mode=0o700, parents=True)
    _fill(JobFolder(new), deployment, job, own)
    _sync_all(new)
    new.rename(folder.path)
    sync_folder(deployment.jobs_folder)
    return deployment.jobs.add(name, job.hash())


def _fill(folder: JobFolder, deployment: Deployment, job: Job, own: OwnData) -> None:
    from safetensors.numpy import save

    from tuning.compiler import compile_recipe
    from tuning.split_compiler import compile_split

    recipe = recipe_of(job, len(own.class_names))
    split = compile_split(recipe, lanes=job.split.lanes) if job.is_split else None
    compiled = split.device if split else compile_recipe(recipe)
    write_bundle(
        job,
        recipe,
        compiled,
        own.class_names,
        deployment.signing_key,
        folder.bundle,
        split=split_spec(job, split) if split else None,
    )
    batch = recipe.training.batch_size
    costs = Costs(
        dataset=own.name,
        total_parameters=compiled.total_parameters,
        flops_per_sample=compiled.step_flops / batch,
    )
    if split is not None:
        shutil.copytree(split.server, folder.body)
        costs = replace(
            costs,
            local_flops_per_sample=split.flops.local / batch,
            score_flops_per_sample=split.flops.scores / batch,
        )
    write_whole(folder.own, _json(asdict(costs)))
    write_whole(folder.job, dump_job(job).encode())
    for which, arrays in (("test", own.test), ("validation", own.validation)):
        if len(arrays.get("labels", ())):
            whole = {key: np.ascontiguousarray(array) for key, array in arrays.items()}
            write_whole(folder.path / f"{which}.safetensors", save(whole))


def read_costs(folder: JobFolder) -> Costs:
    """Raises: DeploymentError for a file that cannot be read."""
    try:
        return Costs(**json.loads(folder.own.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise DeploymentError(f"{folder.own}: cannot be read ({error})") from error


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def _sync_all(folder: Path) -> None:
    """Copies are made without a sync; what the registry names must be there after a power cut."""
    for path in (*folder.rglob("*"), folder):
        sync_folder(path)  # of a file it syncs the file
