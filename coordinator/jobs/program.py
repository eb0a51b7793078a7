# SPDX-License-Identifier: Apache-2.0
"""The program that SuperLink finds under the name of Flower's own; see `process`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Final

COMMAND: Final = "flwr-serverapp"
FOLDER_VARIABLE: Final = "FEDLOOM_DEPLOYMENT"
"""The environment variable that names the deployment's folder."""

_MODULE: Final = "coordinator.jobs.process"


def write_program(folder: Path) -> None:
    """Put it into a folder, which should come first on SuperLink's PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    command = folder / COMMAND
    line = f'exec {shlex.quote(sys.executable)} -m {_MODULE} "$@"\n'
    command.write_text("#!/bin/sh\n" + line, encoding="utf-8")
    command.chmod(0o700)
