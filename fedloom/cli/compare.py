# SPDX-License-Identifier: Apache-2.0
"""`fedloom compare`: several jobs or runs in one table and one plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli.run_folder import choose_run_folder
from fedloom.cli.simulate import job_overrides


def compare(
    jobs: Annotated[
        list[Path],
        typer.Argument(metavar="JOB.toml|RUN ...", help="Job files to run, or finished runs."),
    ],
    clients: Annotated[int | None, typer.Option(help="As in simulate, for every job.")] = None,
    dataset: Annotated[str | None, typer.Option(help="As in simulate.")] = None,
    partition: Annotated[str | None, typer.Option(help="As in simulate.")] = None,
    backend: Annotated[str | None, typer.Option(help="As in simulate.")] = None,
    seed: Annotated[int | None, typer.Option(help="As in simulate.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where runs and compare.html go (default: runs/compare)."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the comparison that is in DIR already.")
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change any key of every job."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print compare.json on stdout, nothing else.")
    ] = False,
) -> None:
    """Run each job file, read each finished run directory, and put them side by side."""
    from fedloom.progress import progress_on
    from simulations.compare import compare as run
    from simulations.compare import prepare, to_document, to_table

    overrides = job_overrides(
        clients=clients, dataset=dataset, partition=partition, backend=backend, seed=seed
    )
    # Every job file is read before the first one runs, so that a wrong one costs nothing.
    entries = prepare(jobs, overrides=[*overrides, *(settings or [])])
    folder = choose_run_folder(out, name="compare", force=force)
    with progress_on() as progress:
        rows = run(entries, folder, progress=progress)
    if as_json:
        typer.echo(json.dumps(to_document(rows), indent=2))
    else:
        typer.echo(to_table(rows))
        typer.echo(f"\ncomparison  {folder / 'compare.html'}")
