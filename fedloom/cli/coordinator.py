# SPDX-License-Identifier: Apache-2.0
"""`fedloom coordinator`: a private deployment, from its keys to its members."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedloom.cli import jobs
from fedloom.cli.plain import PlainCommand
from fedloom.cli.variables import COORDINATOR_VARIABLE, FINGERPRINT_VARIABLE, TOKEN_VARIABLE
from fedloom.errors import FAILED, UsageError

if TYPE_CHECKING:
    from coordinator.enrolment.devices import Device

app = typer.Typer(
    help="Set up a private deployment, admit its devices, and run jobs on them.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
token_app = typer.Typer(
    help="What a device shows once, to become a member.", no_args_is_help=True,
    rich_markup_mode=None,
)  # fmt: skip
app.add_typer(token_app, name="token")

_Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The deployment's folder.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command(cls=PlainCommand)
def init(
    folder: _Folder,
    name: Annotated[str, typer.Option(help="What devices know the coordinator as.")],
    address: Annotated[
        list[str],
        typer.Option(
            metavar="HOST", help="DNS name or IP address that devices reach it by; again for more."
        ),
    ],
    port: Annotated[int, typer.Option(help="The one public port.")] = 8443,
    split_port: Annotated[int, typer.Option(help="Public port of the split server.")] = 8444,
    operator_port: Annotated[int, typer.Option(help="Health and metrics, on loopback.")] = 9443,
    superlink_port: Annotated[int, typer.Option(help="Flower's own, on loopback.")] = 9092,
) -> None:
    """Make the keys and settings of a deployment in DIR."""
    from coordinator.deployment import Deployment, Settings

    settings = Settings(
        name=name,
        addresses=tuple(address),
        port=port,
        split_port=split_port,
        operator_port=operator_port,
        superlink_port=superlink_port,
    )
    with Deployment.create(folder, settings) as made:
        typer.echo(f"deployment   {folder}")
        typer.echo(f"devices use  https://{address[0]}:{port}")
        typer.echo(f"fingerprint  {made.authority.fingerprint}")
    typer.echo(f"next         fedloom coordinator token create {folder} --label LABEL")


@app.command(cls=PlainCommand)
def up(folder: _Folder) -> None:
    """Run the deployment in DIR, and restart what dies, until ctrl-c or SIGTERM."""
    from coordinator.up import run_deployment

    typer.echo(f"starting; logs are in {folder / 'logs'}")
    run_deployment(folder)


@token_app.callback()
def _group() -> None:
    pass


@token_app.command(cls=PlainCommand)
def create(
    folder: _Folder,
    label: Annotated[str, typer.Option(help="Devices that use it are called after it.")],
    quota: Annotated[int, typer.Option(help="Devices that may use it.")] = 1,
    hours: Annotated[float, typer.Option(help="Hours until it is worth nothing.")] = 1.0,
    as_json: _Json = False,
    as_env: Annotated[
        bool, typer.Option("--env", help="Print the variables that `device enroll` reads.")
    ] = False,
) -> None:
    """Make a token. It is shown this once."""
    if as_json and as_env:
        raise UsageError("--json and --env are two forms of one answer: give one of them")
    from coordinator.deployment import Deployment

    with Deployment(folder) as open_:
        token = open_.enrolment.create_token(label, quota=quota, lifetime_s=3600 * hours)
        settings, fingerprint = open_.settings, open_.authority.fingerprint
    url = f"https://{settings.addresses[0]}:{settings.port}"
    if as_json:
        told = {"token": token, "coordinator": url, "fingerprint": fingerprint}
        typer.echo(json.dumps(told, indent=2))
    elif as_env:
        typer.echo(f"{COORDINATOR_VARIABLE}={url}")
        typer.echo(f"{TOKEN_VARIABLE}={token}")
        typer.echo(f"{FINGERPRINT_VARIABLE}={fingerprint}")
    else:
        typer.echo(f"token        {token}")
        typer.echo(f"coordinator  {url}")
        typer.echo(f"fingerprint  {fingerprint}")


@app.command(cls=PlainCommand)
def devices(folder: _Folder, as_json: _Json = False) -> None:
    """List the members, and who was one."""
    from coordinator.deployment import Deployment

    with Deployment(folder) as open_:
        found = open_.enrolment.devices.all()
    if as_json:
        typer.echo(json.dumps([_described(device) for device in found], indent=2))
    elif found:
        typer.echo(_table(found))
    else:
        typer.echo(f"no device yet; next: fedloom coordinator token create {folder} --label LABEL")


@app.command(cls=PlainCommand)
def revoke(
    folder: _Folder,
    name: Annotated[str, typer.Argument(metavar="DEVICE", help="As `devices` lists it.")],
    why: Annotated[str, typer.Option(help="For the audit log.")] = "",
) -> None:
    """Shut a device out for good; what it sends from now on is refused."""
    from coordinator.deployment import Deployment

    with Deployment(folder) as open_:
        known = open_.enrolment.devices.by_name(name)
        if known is None:
            names = ", ".join(device.name for device in open_.enrolment.devices.all())
            raise UsageError(f"expected one of {names or 'no device yet'}, found {name}")
        changed = open_.enrolment.revoke(name, why=why)
    typer.echo(f"{name}: revoked" if changed else f"{name}: was revoked before")


@app.command(cls=PlainCommand)
def audit(folder: _Folder, as_json: _Json = False) -> None:
    """Print the log of who did what, after checking that nothing in it was changed."""
    from coordinator.deployment import Deployment

    with Deployment(folder) as open_:
        broken = open_.enrolment.audit.verify()
        entries = list(open_.enrolment.audit.entries())
        number, head = open_.enrolment.audit.head()
    if as_json:
        shown = [
            {
                "number": entry.number,
                "time": entry.time,
                "event": entry.event,
                "subject": entry.subject,
                "detail": dict(entry.detail),
            }
            for entry in entries
        ]
        whole = {"entries": shown, "head": head, "broken": str(broken) if broken else None}
        typer.echo(json.dumps(whole, indent=2))
    else:
        for entry in entries:
            detail = " ".join(f"{key}={value}" for key, value in entry.detail.items())
            line = f"{entry.number:>6}  {_moment(entry.time)}  {entry.event:<15} {entry.subject}"
            typer.echo(f"{line}  {detail}".rstrip())
        if broken is None:
            typer.echo(f"unchanged: {number} entries, the last is {head}")
    if broken is not None:
        typer.echo(f"changed: {broken}", err=True)
        raise typer.Exit(FAILED)


jobs.add_commands(app)


def _described(device: Device) -> dict[str, Any]:
    return {
        "name": device.name,
        "fingerprint": device.fingerprint,
        "label": device.label,
        "enrolled": device.enrolled,
        "seen": device.seen,
        "certificate_until": device.not_after,
        "versions": dict(device.versions),
        "capabilities": dict(device.capabilities),
        "rounds": device.rounds,
        "bytes_up": device.bytes_up,
        "bytes_down": device.bytes_down,
        "revoked": device.revoked,
    }


def _table(found: list[Device]) -> str:
    from reports.units import bytes_text

    rows = [("device", "last seen", "rounds", "up", "down", "state")]
    for device in found:
        rows.append(
            (
                device.name,
                _moment(device.seen),
                str(device.rounds),
                bytes_text(device.bytes_up),
                bytes_text(device.bytes_down),
                "member" if device.revoked is None else f"revoked {_moment(device.revoked)}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
