# SPDX-License-Identifier: Apache-2.0
"""The command line. One file a command group; each imports its work when it runs, so that
`fedloom --help` stays quick. Exit codes: 0 done, 1 failed, 2 bad input."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import click
import typer

from fedloom.cli import audit, bench, bundle, compare, coordinator, device, doctor, simulate
from fedloom.cli.plain import PlainCommand
from fedloom.errors import BAD_INPUT, DONE, FAILED, explain

# What typer makes of ctrl-c.
_INTERRUPTED = 130

app = typer.Typer(
    name="fedloom",
    help="Fine-tune pre-trained models over many devices whose data never leaves them.",
    epilog="Exit codes: 0 done, 1 failed, 2 bad input.",
    add_completion=False,
    no_args_is_help=True,
    suggest_commands=False,  # click does it already
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(name="simulate", cls=PlainCommand)(simulate.simulate)
app.command(name="compare", cls=PlainCommand)(compare.compare)
app.add_typer(bundle.app, name="bundle")
app.add_typer(coordinator.app, name="coordinator")
app.add_typer(device.app, name="device")
app.add_typer(bench.app, name="bench")
app.add_typer(audit.app, name="audit")
app.command(name="doctor", cls=PlainCommand)(doctor.doctor)


def _version(wanted: bool) -> None:
    if wanted:
        from fedloom import __version__

        typer.echo(f"fedloom {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error came from.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None:
    context.obj = {"traceback": traceback}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns: its exit code; one message on stderr where it is not 0."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        code = app(args=given, prog_name="fedloom", standalone_mode=False)
    except click.UsageError as error:
        error.show()
        return BAD_INPUT
    except click.ClickException as error:
        error.show()
        return FAILED
    except click.Abort:
        return _say(FAILED, "interrupted")
    except Exception as error:
        known = explain(error)
        # Before any parsing has told, so that it works for every command.
        if known is None or "--traceback" in given:
            import traceback

            traceback.print_exception(error)
        if known is None:
            return _say(FAILED, f"{type(error).__name__}: {error} (this is a fault of fedloom)")
        return _say(*known)
    if code == _INTERRUPTED:
        return _say(FAILED, "interrupted")
    return code if isinstance(code, int) else DONE


def _say(code: int, message: str) -> int:
    print(f"fedloom: {message}", file=sys.stderr)
    return code
