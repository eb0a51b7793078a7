# SPDX-License-Identifier: Apache-2.0
"""`fedloom doctor`: what is missing or misconfigured, and the mend."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def doctor(
    coordinator: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Look at this deployment's folder as well.")
    ] = None,
    device: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Look at this device's folder as well.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check this machine; each line is ok, warn or fail, with the mend. Fails if a line does."""
    from fedloom.doctor import State, examine

    checks = examine(coordinator=coordinator, device=device)
    failed = any(check.state is State.FAIL for check in checks)
    if as_json:
        document = {"checks": [asdict(check) for check in checks], "healthy": not failed}
        typer.echo(json.dumps(document, indent=2))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            typer.echo(f"{check.state:4}  {check.name:{width}}  {check.found}")
            if check.mend:
                typer.echo(f"{'':4}  {'':{width}}  mend: {check.mend}")
    if failed:
        raise typer.Exit(1)
