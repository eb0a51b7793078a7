# SPDX-License-Identifier: Apache-2.0
"""`fedloom bench`: the figures that the project promises, measured on this machine."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli.plain import PlainCommand

app = typer.Typer(
    help="Measure, and print each figure beside its target.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
_Out = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write the JSON object to FILE too.")
]
_Quick = Annotated[
    bool, typer.Option("--quick", help="Measure less of each; the figures say that they are quick.")
]


class _Bench(StrEnum):
    SIMULATION = "simulation"
    WIRE = "wire"
    DEVICE = "device"
    AGGREGATION = "aggregation"
    SECURE_AGGREGATION = "secure-aggregation"
    SPLIT = "split"
    DEPLOYMENT = "deployment"


@app.command(cls=PlainCommand)
def simulation(as_json: _Json = False, out: _Out = None, quick: _Quick = False) -> None:
    """Cohort against sequential, Ray and central training; accuracies."""
    _measure(_Bench.SIMULATION, as_json=as_json, out=out, quick=quick)


@app.command(cls=PlainCommand)
def wire(as_json: _Json = False, out: _Out = None, quick: _Quick = False) -> None:
    """Bytes on the wire and what compression costs."""
    _measure(_Bench.WIRE, as_json=as_json, out=out, quick=quick)


@app.command(cls=PlainCommand)
def device(as_json: _Json = False, out: _Out = None, quick: _Quick = False) -> None:
    """Start, memory and step time of a device beside torch; parity of the graphs."""
    _measure(_Bench.DEVICE, as_json=as_json, out=out, quick=quick)


@app.command(cls=PlainCommand)
def aggregation(as_json: _Json = False, out: _Out = None, quick: _Quick = False) -> None:
    """What mergers get right, how fast they are, and what attacks leave of the accuracy."""
    _measure(_Bench.AGGREGATION, as_json=as_json, out=out, quick=quick)


@app.command(cls=PlainCommand)
def secure_aggregation(as_json: _Json = False, out: _Out = None, quick: _Quick = False) -> None:
    """Secure sums: exactness with dropouts, cheating servers, bytes and seconds."""
    _measure(_Bench.SECURE_AGGREGATION, as_json=as_json, out=out, quick=quick)


@app.command(cls=PlainCommand)
def split(as_json: _Json = False, out: _Out = None, quick: _Quick = False) -> None:
    """Split training: parity with the whole network, operations, bytes and speed."""
    _measure(_Bench.SPLIT, as_json=as_json, out=out, quick=quick)


@app.command(cls=PlainCommand)
def deployment(as_json: _Json = False, out: _Out = None, quick: _Quick = False) -> None:
    """What a deployment's gateway and journal carry: requests, bytes, commits."""
    _measure(_Bench.DEPLOYMENT, as_json=as_json, out=out, quick=quick)


def _measure(bench: _Bench, *, as_json: bool, out: Path | None, quick: bool) -> None:
    from importlib import import_module

    from fedloom.progress import progress_on
    from simulations.benchmarks.figure import to_json, to_table

    module = import_module(f"simulations.benchmarks.{bench.replace('-', '_')}")
    with progress_on() as progress:
        figures = module.figures(progress, quick=quick)
    document = to_json(figures)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(document, encoding="utf-8")
    typer.echo(document if as_json else to_table(figures), nl=not as_json)
