# SPDX-License-Identifier: Apache-2.0
"""`fedloom device`: what a device does with the bundles that it got. None of it loads torch."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedloom.cli.plain import PlainCommand
from fedloom.errors import UsageError

if TYPE_CHECKING:
    from edge_runtime.adapter import Adapter
    from edge_runtime.bundle import Bundle
    from edge_runtime.predictor import Prediction

app = typer.Typer(
    help="Become a member of a deployment; predict without a training framework.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


_Home = Annotated[
    Path, typer.Option("--dir", metavar="DIR", help="Where the device keeps what it is.")
]
_HOME = Path("~/.local/share/fedloom/device")


@app.command(cls=PlainCommand)
def enroll(
    coordinator: Annotated[str, typer.Option(metavar="URL", help="As the operator told it.")],
    token: Annotated[str, typer.Option(help="As the operator told it; it is used up by this.")],
    fingerprint: Annotated[
        str, typer.Option(metavar="HEX", help="Of the coordinator's authority, from the operator.")
    ],
    home: _Home = _HOME,
) -> None:
    """Make this device a member of a deployment. Its key is made here and never leaves."""
    from client_sdk import enrolment

    held = enrolment.enroll(home.expanduser(), coordinator, token, fingerprint)
    typer.echo(f"device       {held.device}")
    typer.echo(f"coordinator  {held.coordinator}")
    typer.echo(f"signer       {held.signing_key}")


@app.command(cls=PlainCommand)
def status(
    home: _Home = _HOME,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say who this device is, and until when its certificate is valid."""
    from client_sdk.identity import Identity

    held = Identity(home.expanduser()).membership
    if held is None:
        raise UsageError(f"{home}: no member of any deployment; enrol with: fedloom device enroll")
    until = datetime.fromtimestamp(held.not_after, UTC)
    valid = until > datetime.now(UTC)
    if as_json:
        told = {
            "device": held.device,
            "coordinator": held.coordinator,
            "signer": held.signing_key,
            "fingerprint": held.fingerprint,
            "certificate_until": held.not_after,
            "certificate_valid": valid,
        }
        typer.echo(json.dumps(told, indent=2))
    else:
        typer.echo(f"device       {held.device}")
        typer.echo(f"coordinator  {held.coordinator}, authority {held.fingerprint}")
        word = "valid until" if valid else "ran out on"
        typer.echo(f"certificate  {word} {until:%Y-%m-%d %H:%M:%SZ}")


@app.command(cls=PlainCommand)
def leave(home: _Home = _HOME) -> None:
    """Remove what enrolment made on this device: its key, certificate and pins."""
    from client_sdk.identity import leave_folder

    leave_folder(home.expanduser())
    typer.echo(f"{home}: no member any more; ask the operator to revoke the device as well")


@app.command(cls=PlainCommand)
def predict(
    folder: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle.")],
    images: Annotated[
        Path,
        typer.Argument(help='.npz with "images", .npy, an IDX file, an image or a folder of them.'),
    ],
    adapter: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A run's adapter/ (default: what the bundle holds)."),
    ] = None,
    own: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The device's own adapter.")
    ] = None,
    mix: Annotated[
        float | None,
        typer.Option(metavar="W", help="Predict with W * own + (1 - W) * adapter, W from 0 to 1."),
    ] = None,
    lame: Annotated[
        bool,
        typer.Option("--lame", help="Correct the probabilities by how alike the images are."),
    ] = False,
    signer: Annotated[
        str | None,
        typer.Option(metavar="HEX", help="Public key that must have signed the bundle."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say the class of each image in IMAGES, and how probable it is."""
    from edge_runtime.bundle import open_bundle
    from edge_runtime.predictor import Predictor

    _check_options(adapter, own, mix)
    bundle = open_bundle(folder, public_key=signer)
    predictor = Predictor(bundle)
    predictor.use(_adapter(bundle, adapter, own, mix))
    names, inputs = _inputs(bundle, images)
    found = predictor.predict(inputs, lame=lame)
    typer.echo(
        json.dumps(_document(bundle, names, found), indent=2) if as_json else _table(names, found)
    )


def _check_options(adapter: Path | None, own: Path | None, mix: float | None) -> None:
    if mix is not None and (adapter is None or own is None):
        raise UsageError("--mix is between two adapters: give --adapter DIR and --own DIR with it")
    if mix is None and adapter is not None and own is not None:
        raise UsageError("--adapter and --own together need --mix W: how much of the own one")


def _adapter(
    bundle: Bundle, adapter: Path | None, own: Path | None, mix: float | None
) -> Adapter | None:
    from edge_runtime.adapter import mixed, read_adapter

    mine = None if own is None else read_adapter(own, bundle)
    shared = None if adapter is None else read_adapter(adapter, bundle)
    if mine is not None and shared is not None and mix is not None:
        return mixed(mine, shared, mix)
    return mine or shared


def _inputs(bundle: Bundle, images: Path) -> tuple[list[str], dict[str, Any]]:
    import numpy as np

    from edge_runtime.errors import DataError
    from edge_runtime.preprocessing import apply
    from fedloom.images import read_images

    settings = bundle.manifest.preprocessing
    if settings.kind != "image":
        raise DataError(f"bundle {bundle.folder} reads {settings.kind}, not images")
    names, blocks = read_images(images)
    made = [apply(settings, {"images": block}) for block in blocks]
    return names, {name: np.concatenate([part[name] for part in made]) for name in made[0]}


def _document(bundle: Bundle, names: list[str], found: Prediction) -> dict[str, Any]:
    rows = zip(names, found.names, found.probabilities, strict=True)
    return {
        "job": bundle.manifest.job,
        "method": bundle.manifest.method,
        "class_names": list(found.class_names),
        "lame": found.lame,
        "predictions": [
            {
                "image": image,
                "class": name,
                "probability": round(float(row.max()), 6),
                "probabilities": [round(float(value), 6) for value in row],
            }
            for image, name, row in rows
        ],
    }


def _table(names: list[str], found: Prediction) -> str:
    rows = [("image", "class", "probability")]
    rows += [
        (image, name, f"{row.max():.4f}")
        for image, name, row in zip(names, found.names, found.probabilities, strict=True)
    ]
    wide = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"{image:{wide[0]}}  {name:{wide[1]}}  {share}" for image, name, share in rows]
    if found.lame:
        likeness = "query features" if found.lame == "features" else "logits"
        lines.append(f"\nprobabilities corrected by LAME, by the likeness of {likeness}")
    return "\n".join(lines)
