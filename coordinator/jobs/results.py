# SPDX-License-Identifier: Apache-2.0
"""What a job of a deployment leaves behind, as a simulation does; it may be written again."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from coordinator.bundles import recipe_of
from coordinator.fold import fold_tensors
from coordinator.job import Job
from coordinator.jobs.folder import JobFolder
from coordinator.jobs.registry import JobEntry
from coordinator.jobs.submit import Costs, read_costs
from coordinator.journal import Journal
from coordinator.reports import RoundReport
from coordinator.summary import Played, summary_of, write_metrics
from edge_runtime.bundle import Bundle
from edge_runtime.split_trainer import kept_count
from protocol.files import result_of
from protocol.tensors import Tensors
from reports.report import write_report

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_UNTOLD: Final = (
    "devices do not say how many samples they have: operations and samples are counted as of one "
    'each; update.metrics = "samples" lets them tell'
)


def write_results(
    folder: JobFolder,
    entry: JobEntry,
    job: Job,
    bundle: Bundle,
    journal: Journal,
    tensors: Tensors,
    offset: Tensors,
    key: Ed25519PrivateKey,
) -> None:
    """Figures, adapter, predicting bundle and report, from what the rounds came to.

    Raises: as `coordinator.fold.fold_tensors`; OSError where it cannot be written.
    """
    reports = [RoundReport.from_json(row) for row in journal.reports(job.hash())]
    write_metrics(folder.path / "metrics.jsonl", reports)
    _export(folder, job, bundle, tensors, offset, key)
    summary = _summary(folder, entry, job, bundle, journal, reports)
    text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
    (folder.path / "summary.json").write_text(text, encoding="utf-8")
    write_report(folder.path)


def _export(
    folder: JobFolder,
    job: Job,
    bundle: Bundle,
    tensors: Tensors,
    offset: Tensors,
    key: Ed25519PrivateKey,
) -> None:
    from tuning.export import export_adapter

    recipe = recipe_of(job, len(bundle.manifest.class_names))
    export_adapter(recipe, tensors, folder.path / "adapter", bundle.manifest, offset=offset)
    if "predict" in bundle.manifest.graphs:
        name = result_of(bundle.manifest.job)
        fold_tensors(job, bundle, tensors, folder.predict, key, offset=offset, name=name)


def _summary(
    folder: JobFolder,
    entry: JobEntry,
    job: Job,
    bundle: Bundle,
    journal: Journal,
    reports: Sequence[RoundReport],
) -> dict[str, Any]:
    costs, manifest = read_costs(folder), bundle.manifest
    merged = journal.merged_samples(job.hash())
    last = reports[-1] if reports else None
    tested = last.per_client_accuracy if last else {}
    names = sorted({*merged, *tested})
    played = Played(
        dataset=costs.dataset,
        class_names=manifest.class_names,
        backbone=manifest.backbone,
        trainable_parameters=manifest.trainable.size,
        total_parameters=costs.total_parameters,
        clients=len(names),
        client_flops=round(sum(_flops(job, costs, n) for each in merged.values() for n in each)),
        passed_samples=sum(_passed(job, n) for each in merged.values() for n in each),
        per_client=[_described(name, merged, last) for name in names],
        notes=[] if job.tells_samples else [_UNTOLD],
    )
    found = summary_of(job, reports, played, wall_seconds=time.time() - entry.submitted)
    return found | {"name": entry.name}


def _described(
    name: str, merged: Mapping[str, Sequence[int]], last: RoundReport | None
) -> dict[str, Any]:
    return {
        "id": name,
        "samples": max(merged.get(name, ()), default=0),
        "updates": len(merged.get(name, ())),
        "accuracy": last.per_client_accuracy.get(name) if last else None,
        "local_accuracy": last.per_client_local.get(name) if last else None,
        "mixed_accuracy": last.per_client_mixed.get(name) if last else None,
        "selected": list(last.selected.get(name, ())) if last else [],
    }


def _passed(job: Job, samples: int) -> int:
    """Samples that went through the whole network for one update of a client with so many."""
    training = job.training
    if job.is_split:
        samples = kept_count(samples, job.split.keep, job.split.drop)
    passed = samples * training.local_epochs
    most = training.local_steps * training.batch_size
    return min(passed, most) if most else passed


def _flops(job: Job, costs: Costs, samples: int) -> float:
    """Operations of one update of a client with so many samples."""
    through = _passed(job, samples) * costs.flops_per_sample
    if not job.is_split:
        return through
    split = job.split
    kept = kept_count(samples, split.keep, split.drop)
    scoring = split.scoring_epochs if split.prunes else 0
    local = (samples * scoring + kept * split.local_epochs) * costs.local_flops_per_sample
    scores = samples * costs.score_flops_per_sample if split.prunes else 0
    return through + local + scores
