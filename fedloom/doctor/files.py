# SPDX-License-Identifier: Apache-2.0
"""A folder of ours: who may read it, whose it is, how much room it has, and Flower's version."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Final

from fedloom.doctor.check import Check
from fedloom.doctor.machine import within
from fedloom.doctor.mistakes import Side, fail, warn, well

_GIB: Final = 1 << 30
_LOW_GIB: Final = 2.0
_FULL_GIB: Final = 0.2
_OTHERS: Final = 0o077
_SHOWN: Final = 3  # files named in a line; the mend is for all of them
FLOWER: Final = ">=1.41,<1.43"


def check_files(side: Side, folder: Path, private: Iterable[Path]) -> Check:
    """Mistake 2: others may read a key, or a file is another account's."""
    strangers = [path for path in _walk(folder) if path.lstat().st_uid != folder.stat().st_uid]
    owner = _account(folder.stat().st_uid)
    if strangers:
        found = f"{_names(strangers)}: expected the owner {owner} of the folder, found another's"
        return fail(side, 2, found, f"chown -R {owner} {folder}")
    if folder.stat().st_uid != os.geteuid():
        found = f"{folder} is {owner}'s, and this process is {_account(os.geteuid())}'s"
        return fail(
            side, 2, found, f"use the owner's account for all commands: sudo -u {owner} ..."
        )
    there = [path for path in (folder, *private) if path.exists()]
    if open_to_all := [path for path in there if path.stat().st_mode & _OTHERS]:
        found = f"{_names(open_to_all)}: expected files that their owner alone may read"
        mend = f"chmod -R go= {folder}; replace keys that others may have read"
        return fail(side, 2, found, mend)
    return well(side, 2, f"{len(there)} private files, all {owner}'s alone")


def check_disk(side: Side, folder: Path) -> Check:
    """Mistake 3: no room is left."""
    free = shutil.disk_usage(folder).free / _GIB
    found = f"{free:.1f} GiB free in {folder}"
    if free >= _LOW_GIB:
        return well(side, 3, found)
    mend = f"free some: jobs, bundles and logs need up to {_LOW_GIB:g} GiB"
    return (fail if free < _FULL_GIB else warn)(side, 3, found, mend)


def flower_fault(version: str) -> str:
    """What is wrong with a version of Flower; "" where nothing is."""
    if version == "none":
        return f"flwr: expected {FLOWER}, found none"
    return "" if within(version, FLOWER) else f"flwr: expected {FLOWER}, found {version}"


def flower_version() -> str:
    """Of the one installed here, or "none"."""
    try:
        return metadata.version("flwr")
    except metadata.PackageNotFoundError:
        return "none"


def _walk(folder: Path) -> Iterator[Path]:
    """What lies in a folder, two levels deep: deeper lies what its processes made."""
    for path in sorted(folder.iterdir()):
        yield path
        if path.is_dir() and not path.is_symlink() and os.access(path, os.R_OK | os.X_OK):
            yield from sorted(path.iterdir())


def _account(number: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _names(paths: list[Path]) -> str:
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return ", ".join(map(str, paths[:_SHOWN])) + more
