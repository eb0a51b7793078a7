# SPDX-License-Identifier: Apache-2.0
"""`fedloom simulate`: one job over many simulated clients."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from fedloom.cli.run_folder import choose_run_folder, find_run_folder
from fedloom.errors import UsageError


def simulate(
    job: Annotated[Path, typer.Argument(metavar="JOB.toml", help="The job file.")],
    clients: Annotated[int | None, typer.Option(help="How many clients share the data.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="digits, fashion-mnist, debian-descriptions or a folder.")
    ] = None,
    partition: Annotated[
        str | None,
        typer.Option(help="iid, dirichlet:0.3, shards:2, natural or domains:mixed."),
    ] = None,
    backend: Annotated[str | None, typer.Option(help="cohort, sequential or ray.")] = None,
    seed: Annotated[int | None, typer.Option(help="Decides every random choice.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The run directory (default: runs/NAME OF THE JOB)."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the run that is in DIR already.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run that was cut off in DIR.")
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change any key of the job."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print summary.json on stdout, nothing else.")
    ] = False,
) -> None:
    """Run the job file JOB.toml over simulated clients; leaves report.html and more in DIR."""
    from coordinator.job import load_job

    overrides = job_overrides(
        clients=clients, dataset=dataset, partition=partition, backend=backend, seed=seed
    )
    loaded = load_job(job, [*overrides, *(settings or [])])
    if resume and force:
        raise UsageError("--resume goes on with a run and --force removes it: give one of them")
    if resume:
        folder = find_run_folder(out, name=loaded.job.name)
    else:
        folder = choose_run_folder(out, name=loaded.job.name, force=force)

    # Only now, as it takes seconds to load: a wrong job file is told at once.
    from fedloom.progress import progress_on
    from simulations.run import simulate as run

    with progress_on() as progress:
        summary = run(loaded, folder, progress=progress)
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
    else:
        typer.echo(summary_text(summary, folder))


def job_overrides(
    *,
    clients: int | None = None,
    dataset: str | None = None,
    partition: str | None = None,
    backend: str | None = None,
    seed: int | None = None,
) -> list[str]:
    """The named options as the `section.key=value` that `--set` takes."""
    if dataset is not None and (os.sep in dataset or Path(dataset).is_dir()):
        # A path on the command line is meant from here, one in a job file from the file.
        dataset = str(Path(dataset).resolve())
    keys = {
        "data.clients": clients,
        "data.dataset": dataset,
        "data.partition": partition,
        "simulation.backend": backend,
        "job.seed": seed,
    }
    return [f"{key}={value}" for key, value in keys.items() if value is not None]


def summary_text(summary: dict[str, Any], folder: Path) -> str:
    """The result in a few lines."""
    from reports.units import bytes_text, count_text, duration_text

    accuracy = summary["accuracy"]
    shown = "not evaluated" if accuracy is None else f"{accuracy:.4f}"
    rejected = _count(summary.get("rejections", 0))
    lines = [
        f"accuracy    {shown}",
        f"sent        up {bytes_text(summary['uplink_bytes'])}, "
        f"down {bytes_text(summary['downlink_bytes'])}",
        f"trained     {count_text(summary['trainable_parameters'])} parameters, "
        f"{summary['samples_per_second']:,.0f} samples/s, "
        f"{duration_text(summary['wall_seconds'])}",
    ]
    if rejected:
        lines.append(f"rejected    {rejected} updates (reasons in the report)")
    skipped = len(summary.get("skipped_clients", ()))
    if skipped:
        lines.append(f"skipped     {skipped} clients (reasons in the report)")
    lines.append(f"report      {folder / 'report.html'}")
    return "\n".join(lines)


def _count(rejections: object) -> int:
    return rejections if isinstance(rejections, int) else len(rejections)  # type: ignore[arg-type]
