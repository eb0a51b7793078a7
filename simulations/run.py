# SPDX-License-Identifier: Apache-2.0
"""A whole simulation: from a job to the directory that a run leaves behind.

job.toml          the job as it ran, complete
bundle/           the compiled, signed job, its predict.onnx with the final adapter folded in
journal.sqlite    every committed round; a run that was cut off goes on from here
metrics.jsonl     a line a round
adapter/          the final tensors, in peft's layout where peft has the method; beside them
                  base_offset.safetensors, where the merger has moved frozen weights
summary.json      the result in figures
report.html       the result in plots
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from coordinator.bundles import recipe_of, sign_bundle, split_spec, write_bundle
from coordinator.example_accounting import require_example_budget
from coordinator.job import Job, dump_job, load_job
from coordinator.journal import Journal
from coordinator.privacy import Privacy
from coordinator.reports import RoundReport
from coordinator.summary import Played, summary_of, write_metrics
from edge_runtime.bundle import open_bundle
from protocol.signing import new_key, public_key_hex
from reports.report import write_report
from simulations.backends.play import play
from simulations.clients import label_distribution
from simulations.errors import RunFolderError
from simulations.progress import ProgressListener, SilentProgress
from simulations.setup import (
    Setup,
    client_flops,
    example_notes,
    load_job_data,
    local_passes_per_round,
    passes_per_round,
    set_up,
)
from tuning.compiler import compile_recipe
from tuning.export import export_result
from tuning.split_compiler import compile_split

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

JOB_FILE: Final = "job.toml"


def simulate(job: Job, out: Path, *, progress: ProgressListener | None = None) -> dict[str, Any]:
    """Run a job over simulated clients and leave its results in `out`; the summary.

    A directory that holds the journal of the same job is continued from its last round.

    Raises:
        DataError, PartitionError, BackboneError, MethodError: the job does not fit together.
        JobError: its privacy cannot be met, or that of single samples costs more than allowed.
        RunFolderError: `out` holds a run of another job.
        JournalError: its journal cannot be gone on with.
    """
    progress = progress or SilentProgress()
    started = time.monotonic()
    _check_folder(job, out)
    if job.privacy.is_private:
        progress.stage("looking for the noise that the privacy budget asks for")
        Privacy.of(job)
    require_example_budget(job)
    out.mkdir(parents=True, exist_ok=True)
    setup = set_up(job, progress)
    key = new_key()
    folder = write_bundle(
        job,
        setup.recipe,
        setup.compiled,
        setup.dataset.class_names,
        key,
        out / "bundle",
        split=split_spec(job, setup.split) if setup.split else None,
    )
    bundle = open_bundle(folder, public_key=public_key_hex(key))
    (out / JOB_FILE).write_text(dump_job(job), encoding="utf-8")

    progress.start(job.rounds.count, len(setup.federation.clients))
    with Journal(out / "journal.sqlite") as journal:
        result = play(setup, bundle, out, journal, progress.round)
        reports = [RoundReport.from_json(row) for row in journal.reports(job.hash())]
    write_metrics(out / "metrics.jsonl", reports)

    progress.stage("writing the adapter and the report")
    export_result(setup.recipe, result.tensors, out / "adapter", folder, offset=result.offset)
    sign_bundle(bundle.manifest, key, folder)
    summary = _summary(setup, reports, wall_seconds=time.monotonic() - started)
    text = json.dumps(summary, indent=2, allow_nan=False)
    (out / "summary.json").write_text(text + "\n", encoding="utf-8")
    write_report(out)
    progress.finish(summary)
    return summary


def build_bundle(job: Job, out: Path, key: Ed25519PrivateKey | None = None) -> Path:
    """Compile a job into a signed bundle, without running it; the bundle's folder.

    Raises: as `simulate`, before anything is run.
    """
    require_example_budget(job)
    dataset = load_job_data(job)
    recipe = recipe_of(job, len(dataset.class_names))
    split = compile_split(recipe, lanes=job.split.lanes) if job.is_split else None
    compiled = split.device if split else compile_recipe(recipe)
    spec = split_spec(job, split) if split else None
    names = dataset.class_names
    return write_bundle(job, recipe, compiled, names, key or new_key(), out, split=spec)


def _check_folder(job: Job, out: Path) -> None:
    file = out / JOB_FILE
    if file.is_file() and load_job(file).hash() != job.hash():
        raise RunFolderError(
            f"{out} holds a run of another job, and a run goes on only with the settings that it "
            f"began with: give the job {file} itself, or start in another folder"
        )


def _summary(
    setup: Setup, reports: Sequence[RoundReport], *, wall_seconds: float
) -> dict[str, Any]:
    job = setup.job
    merged = _merged_samples(setup, reports)
    played = Played(
        dataset=setup.dataset.name,
        class_names=setup.dataset.class_names,
        backbone=setup.compiled.backbone,
        trainable_parameters=setup.compiled.trainable.size,
        total_parameters=setup.compiled.total_parameters,
        clients=len(setup.federation.clients),
        client_flops=client_flops(setup, merged),
        passed_samples=round(merged * (passes_per_round(setup) + local_passes_per_round(setup))),
        per_client=_per_client(setup, reports),
        notes=(*setup.federation.notes, *_privacy_notes(job), *example_notes(setup)),
    )
    return summary_of(job, reports, played, wall_seconds=wall_seconds) | {
        "partition": job.data.partition,
        "skipped_clients": [list(entry) for entry in setup.federation.skipped],
    }


def _privacy_notes(job: Job) -> list[str]:
    if not job.privacy.is_private:
        return []
    return [
        "privacy: a simulation draws clients and noise from the job's seed, so that it can be "
        "repeated; the guarantee is that of the same job with secret seeds, as deployments have"
    ]


def _merged_samples(setup: Setup, reports: Sequence[RoundReport]) -> int:
    """Of all updates together; of clients that do not tell, as many as a client has on average."""
    job, clients = setup.job, setup.federation.clients
    if job.tells_samples:
        return sum(report.samples for report in reports)
    updates = sum(report.updates for report in reports)
    samples = sum(len(client.fit["labels"]) for client in clients)
    return round(updates * samples / max(len(clients), 1))


def _per_client(setup: Setup, reports: Sequence[RoundReport]) -> list[dict[str, Any]]:
    clients = setup.federation.clients
    counts = label_distribution(clients, len(setup.dataset.class_names))
    last = reports[-1] if reports else None
    return [
        {
            "id": client.id,
            "samples": len(client.fit["labels"]),
            "held_out": len(client.held_out["labels"]),
            "accuracy": last.per_client_accuracy.get(client.id) if last else None,
            "local_accuracy": last.per_client_local.get(client.id) if last else None,
            "mixed_accuracy": last.per_client_mixed.get(client.id) if last else None,
            "selected": list(last.selected.get(client.id, ())) if last else [],
            "domain": client.domain,
            "labels": [int(count) for count in row],
        }
        for client, row in zip(clients, counts, strict=True)
    ]
