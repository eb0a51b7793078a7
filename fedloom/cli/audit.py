# SPDX-License-Identifier: Apache-2.0
"""`fedloom audit`: what a run gives away, measured by attacks on it, and what privacy costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom.cli.plain import PlainCommand

if TYPE_CHECKING:
    from simulations.audits.audited import Audited
    from simulations.progress import ProgressListener

app = typer.Typer(
    help="Attack what a run gives away, or see what privacy costs; docs/audits.md explains it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
_Out = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Write the JSON object and the plot into DIR too."),
]
_Quick = Annotated[
    bool, typer.Option("--quick", help="Try less; the figures say that they are quick.")
]


@app.command(cls=PlainCommand)
def canary(as_json: _Json = False, out: _Out = None, quick: _Quick = False) -> None:
    """Does a release with central noise show more of one client than its epsilon allows?"""

    def audit(progress: ProgressListener) -> Audited:
        from simulations.audits.canary import canary_audit

        return canary_audit(progress, quick=quick)

    _run(audit, as_json=as_json, out=out)


@app.command(cls=PlainCommand)
def inversion(as_json: _Json = False, out: _Out = None, quick: _Quick = False) -> None:
    """Can training images be read back from one client's update, a sum, or a noised one?"""

    def audit(progress: ProgressListener) -> Audited:
        from simulations.audits.inversion import inversion_audit

        return inversion_audit(progress, quick=quick)

    _run(audit, as_json=as_json, out=out)


@app.command(cls=PlainCommand)
def membership(as_json: _Json = False, out: _Out = None, quick: _Quick = False) -> None:
    """Can an adapter's training images be told from others, by adapters trained alike?"""

    def audit(progress: ProgressListener) -> Audited:
        from simulations.audits.membership import membership_audit

        return membership_audit(progress, quick=quick)

    _run(audit, as_json=as_json, out=out)


@app.command(cls=PlainCommand)
def accuracy(
    job: Annotated[
        Path | None,
        typer.Option(metavar="JOB.toml", help="A private job (default: Fashion-MNIST, see docs)."),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="How many seeds, from 0 on (default: 3, quick 2).")
    ] = None,
    as_json: _Json = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where runs, the JSON object and the plot go (default: runs/audit-accuracy); "
            "runs that are there already are not played again.",
        ),
    ] = None,
    quick: _Quick = False,
) -> None:
    """What does a job's privacy cost in accuracy, by SSF, LoRA and LoRA with A frozen?"""
    folder = out or Path("runs") / ("audit-accuracy-quick" if quick else "audit-accuracy")

    def audit(progress: ProgressListener) -> Audited:
        from coordinator.job import load_job
        from simulations.audits.accuracy import accuracy_audit

        loaded = None if job is None else load_job(job)
        return accuracy_audit(progress, out=folder, job=loaded, seeds=seeds, quick=quick)

    _run(audit, as_json=as_json, out=folder)


def _run(audit: Callable[[ProgressListener], Audited], *, as_json: bool, out: Path | None) -> None:
    from fedloom.progress import progress_on
    from simulations.benchmarks.figure import to_json, to_table

    if out is not None:
        # Before minutes of work, so that a folder that cannot be made is told at once.
        out.mkdir(parents=True, exist_ok=True)
    with progress_on() as progress:
        audited = audit(progress)
    document = to_json(audited.figures)
    if out is not None:
        (out / "figures.json").write_text(document, encoding="utf-8")
        audited.draw(out / "plot.png")
    typer.echo(document if as_json else to_table(audited.figures), nl=not as_json)
