# SPDX-License-Identifier: Apache-2.0
"""`fedloom audit`: what a run gives away, measured by attacks on it."""

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
    help="Attack what a run gives away, and print what was found; docs/audits.md explains it.",
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
