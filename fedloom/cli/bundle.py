# SPDX-License-Identifier: Apache-2.0
"""`fedloom bundle`: the compiled job by itself, without a deployment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedloom.cli.plain import PlainCommand
from fedloom.cli.run_folder import choose_run_folder
from fedloom.cli.simulate import job_overrides
from fedloom.errors import UsageError

if TYPE_CHECKING:
    from edge_runtime.bundle import Bundle

app = typer.Typer(
    help="Build, look into, verify and fold a compiled job.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="The bundle.")]
_Signer = Annotated[
    str | None,
    typer.Option("--signer", metavar="HEX", help="Public key that must have signed it."),
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command(cls=PlainCommand)
def build(
    job: Annotated[Path, typer.Argument(metavar="JOB.toml", help="The job file.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the bundle goes.")],
    key: Annotated[
        Path | None,
        typer.Option(help="Ed25519 private key (PEM) to sign with; without it a new one."),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="As in simulate.")] = None,
    seed: Annotated[int | None, typer.Option(help="As in simulate.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the bundle in DIR.")] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change any key of the job."),
    ] = None,
) -> None:
    """Compile the job file JOB.toml into a signed bundle in DIR."""
    from coordinator.job import load_job
    from edge_runtime.bundle import open_bundle
    from protocol.signing import load_private_key

    loaded = load_job(job, [*job_overrides(dataset=dataset, seed=seed), *(settings or [])])
    private = None if key is None else load_private_key(key)
    folder = choose_run_folder(out, name=loaded.job.name, force=force)

    # Only now, as it takes seconds to load: a wrong job file is told at once.
    from simulations.run import build_bundle

    built = build_bundle(loaded, folder, key=private)
    # What was just written is read back as a device would read it.
    typer.echo(_text(open_bundle(built, public_key=None), verbose=False))


@app.command(cls=PlainCommand)
def fold(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a finished run.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the bundle goes.")],
    element: Annotated[
        int | None,
        typer.Option(help="Of FedIns: take this element for every image instead of choosing."),
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(help="Ed25519 private key (PEM) to sign with; without it a new one."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the bundle in DIR.")] = False,
) -> None:
    """Make a bundle in DIR that only predicts, with what was trained in RUN folded in."""
    from edge_runtime.bundle import open_bundle
    from protocol.signing import load_private_key

    if out.resolve() in (run.resolve(), *run.resolve().parents):
        raise UsageError(f"{out} holds the run itself: choose another --out")
    private = None if key is None else load_private_key(key)
    folder = choose_run_folder(out, name=out.name, force=force)

    from simulations.fold import fold_run

    made = fold_run(run, folder, element=element, key=private)
    typer.echo(_text(open_bundle(made, public_key=None), verbose=False))


@app.command(cls=PlainCommand)
def inspect(folder: _Folder, signer: _Signer = None, as_json: _Json = False) -> None:
    """Say what the bundle in FOLDER holds, after verifying it."""
    from edge_runtime.bundle import open_bundle

    bundle = open_bundle(folder, public_key=signer)
    if as_json:
        described: dict[str, Any] = json.loads(bundle.manifest.to_json())
        typer.echo(json.dumps({**described, "signer": bundle.public_key}, indent=2))
    else:
        typer.echo(_text(bundle, verbose=True))


@app.command(cls=PlainCommand)
def verify(folder: _Folder, signer: _Signer = None, as_json: _Json = False) -> None:
    """Check the signature, every file's hash and size, and that nothing else is there."""
    from edge_runtime.bundle import open_bundle

    bundle = open_bundle(folder, public_key=signer)
    files = len(bundle.manifest.files)
    if as_json:
        answer = {"valid": True, "job": bundle.manifest.job, "signer": bundle.public_key}
        typer.echo(json.dumps({**answer, "files": files}, indent=2))
    else:
        known = "the expected signer" if signer else f"signer {bundle.public_key}"
        typer.echo(f"{folder}: valid, {files} files, signed by {known}")


def _text(bundle: Bundle, *, verbose: bool) -> str:
    from reports.units import bytes_text, count_text

    manifest = bundle.manifest
    total = sum(entry.size for entry in manifest.files.values())
    lines = [
        f"bundle      {bundle.folder}",
        f"job         {manifest.job}",
        f"backbone    {manifest.backbone}",
        f"method      {manifest.method}",
        f"trains      {count_text(manifest.trainable.size)} values in "
        f"{len(manifest.trainable.names)} tensors",
        f"classes     {len(manifest.class_names)}",
        f"size        {bytes_text(total)} in {len(manifest.files)} files",
        f"signer      {bundle.public_key}",
    ]
    if noise := manifest.noise:
        on = f"its share of a sum of {noise.fewest} or more" if noise.fewest else "each update"
        lines.append(
            f"noise       of each device: {noise.multiplier * noise.clip:.3g} on every value of "
            f"{on}, for changes of a norm up to {noise.clip:g}, in {noise.rounds} rounds at most"
        )
    if verbose:
        lines.append("graphs      " + ", ".join(f"{k}={v}" for k, v in manifest.graphs.items()))
        for name, entry in sorted(manifest.files.items()):
            lines.append(f"  {entry.sha256[:16]}  {bytes_text(entry.size):>9}  {name}")
        for name, spec in manifest.trainable.entries:
            lines.append(f"  {spec.dtype} {list(spec.shape)}  {name}")
    return "\n".join(lines)
