# SPDX-License-Identifier: Apache-2.0
"""What a device's SuperNode starts for each message: the installed client, whatever app is named.

Flower hands a node an app bundle that may hold any Python, installs it and runs it. A device of
ours runs none of it: the SuperNode finds its client process by the command's name, and the folder
of `command_folder` is all of its PATH, so that it finds this module. Bundles are neither unpacked
nor loaded here, and processes for other kinds of tasks are not found at all. The other command that
is there is Flower's own, which waits for messages and starts the client.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp

COMMAND: Final = "flwr-clientapp"
STARTER: Final = "flower-superexec"
# What Flower's runner of client processes is made of, where it touches an app bundle.
_INSTALL: Final = "install_from_fab"
_LOAD: Final = "get_load_client_app_fn"
_STARTER: Final = "from flwr.supercore.cli import flower_superexec; flower_superexec"


def command_folder(folder: Path, module: str) -> Path:
    """A folder with all that a SuperNode may find: `module`, and what starts it, by this Python.

    The module's `main` is expected to call `run_pinned`. Raises: OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_command(folder / COMMAND, "-m", module)
    # By its place and not by its script, which may lie in another folder than this Python.
    _write_command(folder / STARTER, "-c", f"{_STARTER}()")
    return folder


def _write_command(path: Path, *arguments: str) -> None:
    # -P: nothing is imported from the folder in which it happens to run.
    line = shlex.join([sys.executable, "-P", *arguments])
    path.write_text(f'#!/bin/sh\nexec {line} "$@"\n', encoding="utf-8")
    os.chmod(path, 0o700)


def run_pinned(app: Callable[[], ClientApp]) -> None:
    """Flower's own client process, with `app` in the place of what the bundle holds.

    Raises: RuntimeError where Flower's runner is not the one that this was written for: a device
    then runs nothing rather than somebody's code.
    """
    from flwr.common.args import add_args_flwr_app_common, try_obtain_flwr_app_token
    from flwr.supercore.tls import validate_and_resolve_root_certificates
    from flwr.supernode.runtime import run_clientapp as runner

    pin(runner, app)
    # What Flower's own command does. That one lies in a package which loads all of SuperNode with
    # it, its database too: a second for every message.
    parser = argparse.ArgumentParser(prog=COMMAND)
    parser.add_argument("--runtime-api-address", required=True)
    add_args_flwr_app_common(parser=parser)
    given = parser.parse_args()
    runner.run_clientapp(
        runtime_api_address=given.runtime_api_address,
        token=try_obtain_flwr_app_token(given),
        insecure=given.insecure,
        certificates=validate_and_resolve_root_certificates(
            given.root_certificates, given.insecure
        ),
        parent_pid=given.parent_pid,
        runtime_dependency_install=False,
    )


def pin(runner: ModuleType, app: Callable[[], ClientApp]) -> None:
    """Takes out of a runner what unpacks app bundles and what loads them. Raises: RuntimeError."""
    missing = [name for name in (_INSTALL, _LOAD) if not callable(getattr(runner, name, None))]
    if missing:
        raise RuntimeError(
            f"expected {' and '.join(missing)} in {runner.__name__}: this version of Flower starts "
            "clients in another way; install flwr>=1.41,<1.43"
        )

    def install_nothing(*_: Any, **__: Any) -> None:
        """An app bundle stays as it came: bytes."""

    def load(*_: Any, **__: Any) -> Callable[..., ClientApp]:
        return lambda *_, **__: app()

    setattr(runner, _INSTALL, install_nothing)
    setattr(runner, _LOAD, load)
