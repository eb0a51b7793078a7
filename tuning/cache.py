# SPDX-License-Identifier: Apache-2.0
"""Compiled jobs on disk, by the digest of all that they depend on."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

# Compiled jobs that are kept; the least recently used go first. A text job is about 100 MB.
CACHE_ENTRIES: Final = 24
IN_USE_S: Final = 6 * 3600.0
"""An entry that was asked for in this time stays: another process may be reading it."""
INFO_FILE: Final = "compiled.json"
"""Written last: an entry that has it is whole."""


def default_cache() -> Path:
    """`$FEDLOOM_CACHE`, or `fedloom/compiled` in the user's cache folder."""
    if chosen := os.environ.get("FEDLOOM_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "fedloom" / "compiled"


def cached(digest: str, make: Callable[[Path], None], cache: Path | None = None) -> Path:
    """The folder of an entry: there already, or filled by `make` now and kept."""
    cache = cache or default_cache()
    folder = cache / digest
    if not (folder / INFO_FILE).is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="making-") as making:
            work = Path(making) / "entry"
            work.mkdir()
            make(work)
            try:
                work.rename(folder)
            except OSError:
                # Another process made the same entry first; both hold the same content.
                if not (folder / INFO_FILE).is_file():
                    raise
        _forget_oldest(cache, keep=folder)
    os.utime(folder)
    return folder


def _forget_oldest(cache: Path, *, keep: Path) -> None:
    entries = [path for path in cache.iterdir() if (path / INFO_FILE).is_file() and path != keep]
    entries.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    last = time.time() - IN_USE_S
    for path in entries[CACHE_ENTRIES - 1 :]:
        if path.stat().st_mtime < last:
            shutil.rmtree(path, ignore_errors=True)
