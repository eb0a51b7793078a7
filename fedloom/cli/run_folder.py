# SPDX-License-Identifier: Apache-2.0
"""Where a run goes, without ever losing one that is there."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from fedloom.errors import UsageError

JOURNAL = "journal.sqlite"
# One of these says that fedloom made the folder, so that --force removes nothing else.
RUN_FILES = ("job.toml", "summary.json", JOURNAL, "compare.json", "manifest.json")


def choose_run_folder(out: Path | None, *, name: str, force: bool, base: str = "runs") -> Path:
    """`out` if it is free or `force` replaces it; without `out` the first free `base/name`.

    Raises: UsageError for a folder in use.
    """
    if out is None:
        usual = _usual(name, base)
        return _replaced(usual) if force else _first_free(usual)
    if not _in_use(out):
        return out
    if not force:
        raise UsageError(
            f"{out} is not empty: choose another --out, go on with its run by --resume, or replace "
            "it with --force"
        )
    return _replaced(out)


def find_run_folder(out: Path | None, *, name: str, base: str = "runs") -> Path:
    """`out`, without it `base/name`, where a run has begun.

    Raises: UsageError where none has.
    """
    folder = _usual(name, base) if out is None else out
    if not (folder / JOURNAL).is_file():
        raise UsageError(
            f"{folder} holds no run to go on with (it has no {JOURNAL}): give its folder as --out, "
            "or leave --resume away"
        )
    return folder


def _usual(name: str, base: str) -> Path:
    return Path(base) / (re.sub(r"[^\w.-]+", "-", name).strip(".-") or "run")


def _in_use(folder: Path) -> bool:
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def _first_free(folder: Path) -> Path:
    candidate, number = folder, 2
    while _in_use(candidate):
        candidate, number = folder.with_name(f"{folder.name}-{number}"), number + 1
    return candidate


def _replaced(folder: Path) -> Path:
    if not _in_use(folder):
        return folder
    if folder.is_symlink() or not folder.is_dir():
        raise UsageError(f"{folder} is not a plain folder: choose another --out")
    if not any((folder / name).exists() for name in RUN_FILES):
        raise UsageError(
            f"{folder} was not made by fedloom (it has none of {', '.join(RUN_FILES)}), so --force "
            "leaves it alone: choose another --out"
        )
    shutil.rmtree(folder)
    return folder
