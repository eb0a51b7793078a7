# SPDX-License-Identifier: Apache-2.0
"""`fedloom device`: a machine becomes a member, takes part in jobs, and predicts with what came of
them. None of it loads torch."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fedloom.cli.plain import PlainCommand
from fedloom.cli.variables import COORDINATOR_VARIABLE, FINGERPRINT_VARIABLE, TOKEN_VARIABLE
from fedloom.errors import UsageError

if TYPE_CHECKING:
    from client_sdk.identity import Membership
    from edge_runtime.adapter import Adapter
    from edge_runtime.bundle import Bundle
    from edge_runtime.predictor import Prediction

app = typer.Typer(
    help="Become a member of a deployment, take part in its jobs, predict; without torch.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


_Home = Annotated[
    Path, typer.Option("--dir", metavar="DIR", help="Where the device keeps what it is.")
]
_HOME = Path("~/.local/share/fedloom/device")
_TRY_AGAIN_S: Final = 0.5


@app.command(cls=PlainCommand)
def enroll(
    coordinator: Annotated[
        str,
        typer.Option(metavar="URL", envvar=COORDINATOR_VARIABLE, help="As the operator told it."),
    ],
    token: Annotated[
        str,
        typer.Option(
            envvar=TOKEN_VARIABLE,
            show_envvar=True,
            help="As the operator told it; it is used up by this.",
        ),
    ],
    fingerprint: Annotated[
        str,
        typer.Option(
            metavar="HEX",
            envvar=FINGERPRINT_VARIABLE,
            help="Of the coordinator's authority, from the operator.",
        ),
    ],
    wait: Annotated[
        float, typer.Option(metavar="SECONDS", help="For a coordinator that does not answer yet.")
    ] = 0.0,
    once: Annotated[
        bool, typer.Option("--once", help="Do nothing where this device is a member already.")
    ] = False,
    home: _Home = _HOME,
) -> None:
    """Make this device a member of a deployment. Its key is made here and never leaves."""
    from client_sdk.identity import Identity

    held = Identity(home.expanduser()).membership if once else None
    if held is None:
        held = _enrolled(home.expanduser(), coordinator, token, fingerprint, wait)
    typer.echo(f"device       {held.device}")
    typer.echo(f"coordinator  {held.coordinator}")
    typer.echo(f"signer       {held.signing_key}")


@app.command(cls=PlainCommand)
def run(
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="A folder, a .npz or .jsonl file, or module:function; see docs/device.md.",
        ),
    ] = None,
    held_out: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Of the data, to test on and never train on [0.1]."),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="DIR", help="With the tokenizer.json for texts.")
    ] = None,
    hours: Annotated[
        str | None, typer.Option(metavar="HH:MM-HH:MM", help='When to work, local; "" for all day.')
    ] = None,
    power: Annotated[str | None, typer.Option(help="any or mains.")] = None,
    battery: Annotated[
        int | None, typer.Option(metavar="PERCENT", help="Least charge where not on mains.")
    ] = None,
    metered: Annotated[
        str | None, typer.Option(help="allowed or refused: a link that is paid by the byte.")
    ] = None,
    memory: Annotated[int | None, typer.Option(metavar="MIB", help="Least free memory.")] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="Of the training; 0 for one a core.")
    ] = None,
    command: Annotated[
        str | None, typer.Option(help="Asked before work: exit code 0 to work, 1 for not now.")
    ] = None,
    function: Annotated[
        str | None, typer.Option(metavar="MODULE:NAME", help="Asked before work: True to work.")
    ] = None,
    unknown: Annotated[
        str | None, typer.Option(help="wait or work, where a condition cannot be known.")
    ] = None,
    bundles_mb: Annotated[
        int | None, typer.Option(metavar="MIB", help="Disk for jobs' bundles [4096].")
    ] = None,
    outbox_mb: Annotated[
        int | None, typer.Option(metavar="MIB", help="Disk for updates that wait [256].")
    ] = None,
    home: _Home = _HOME,
) -> None:
    """Take part in jobs, until ctrl-c or SIGTERM. What is given is remembered for the next time."""
    import dataclasses
    import logging

    from client_sdk.conditions import Conditions
    from client_sdk.device import Device
    from client_sdk.settings import absolute_source

    asked = {
        "hours": hours,
        "power": power,
        "least_battery_percent": battery,
        "metered": metered,
        "least_free_memory_mb": memory,
        "threads": threads,
        "command": command,
        "function": None if function is None else absolute_source(function),
        "unknown": unknown,
    }
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    device = Device(home)
    before = device.home.settings()
    device.configure(
        data=data,
        held_out=held_out,
        tokenizer=tokenizer,
        bundles_mb=bundles_mb,
        outbox_mb=outbox_mb,
        conditions=dataclasses.replace(before.conditions if before else Conditions(), **given),
    )
    device.run()


@app.command(cls=PlainCommand)
def status(
    home: _Home = _HOME,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say who this device is, whether it runs, what it did last, and whether its data fit."""
    from client_sdk.device import Device

    device = Device(home)
    if device.membership is None:
        raise UsageError(f"{home}: no member of any deployment; enrol with: fedloom device enroll")
    told = device.status()
    if as_json:
        typer.echo(json.dumps(told, indent=2))
        return
    for name, line in _status_lines(told):
        typer.echo(f"{name:<12} {line}")


@app.command(cls=PlainCommand)
def leave(home: _Home = _HOME) -> None:
    """Remove all that was made on this device: key, certificate, bundles, updates, settings."""
    from client_sdk.home import Home

    Home(home.expanduser()).leave()
    typer.echo(f"{home}: no member any more; ask the operator to revoke the device as well")


@app.command(cls=PlainCommand)
def fetch(
    job: Annotated[
        str, typer.Option(metavar="HASH", help="Which job's (default: the last asked about).")
    ] = "",
    home: _Home = _HOME,
) -> None:
    """Fetch the bundle that predicts with what a finished job trained, and print its folder."""
    from client_sdk.device import Device

    typer.echo(Device(home).fetch_result(job))


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


def _enrolled(
    home: Path, coordinator: str, token: str, fingerprint: str, wait_s: float
) -> Membership:
    """As `client_sdk.enrolment.enroll`, tried again while nobody answers."""
    from client_sdk import enrolment
    from client_sdk.errors import CoordinatorUnreachableError

    last = time.monotonic() + wait_s
    while True:
        try:
            return enrolment.enroll(home, coordinator, token, fingerprint)
        except CoordinatorUnreachableError:
            # The token was shown to nobody: that comes after the coordinator has answered once.
            if time.monotonic() >= last:
                raise
        time.sleep(_TRY_AGAIN_S)


def _status_lines(told: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "device", told["device"]
    yield "coordinator", f"{told['coordinator']} at {told['url']}, authority {told['fingerprint']}"
    word = "valid until" if told["certificate_valid"] else "not valid; its end is"
    yield "certificate", f"{word} {_time(told['certificate_until'])}"
    pid = told["running"]
    yield "running", "no" if pid is None else f"yes, process {pid}"
    for name, what in (("asked", "last_survey"), ("worked", "last_work")):
        if last := told[what]:
            yield name, _last_line(last)
    if waits := told["outbox"]:
        yield "outbox", f"{len(waits)} updates, {sum(entry['bytes'] for entry in waits)} bytes"
    if bundles := told["bundles"]:
        yield "bundles", f"{len(bundles)}, {sum(one['bytes'] for one in bundles)} bytes"
    if verdict := told["conditions"]:
        reasons = [*verdict["reasons"], *(f"unknown: {fact}" for fact in verdict["unknown"])]
        yield "conditions", "; ".join(["hold" if verdict["ready"] else "wait", *reasons])
    if (data := told["data"]) is None:
        yield "data", "none named yet: fedloom device run --data SOURCE"
        return
    yield "data", data["source"]
    for fault in data["faults"]:
        yield "", f"- {fault}"
    if not data["faults"]:
        job = data["checked_for"]
        found = f"{data['samples']} samples to train on, {data['held_out']} held out"
        yield "", found + (f"; they fit job {job[:12]}" if job else "; no job has read them yet")


def _last_line(last: Mapping[str, Any]) -> str:
    what = f"job {last['job'][:12] or '?'}"
    if last["round"] is not None:
        what += f", round {last['round']}, {last['task']}"
    said = f"refused: {last['refused']}" if last["refused"] else "answered"
    return f"{_time(last['when'])}, {what}, in {last['seconds']:.1f} s, {said}"


def _time(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%SZ}"


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
