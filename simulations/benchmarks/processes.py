# SPDX-License-Identifier: Apache-2.0
"""Run a command, and watch the memory and the time of all processes that come of it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from simulations.errors import SimulationError

SAMPLE_EVERY_S: Final = 0.02
_MIB: Final = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """What a finished command took. `peak_bytes` is the largest sum over its process tree."""

    seconds: float
    peak_bytes: int
    processes: int
    """Most at a time."""
    output: str

    @property
    def peak_mb(self) -> float:
        """In units of 2**20 bytes."""
        return self.peak_bytes / _MIB


def run_command(
    command: Sequence[str], *, watch_memory: bool = False, environment: dict[str, str] | None = None
) -> Ran:
    """Run to the end; memory is sampled only if asked for, since sampling takes time itself.

    Memory is the proportional set size (PSS): a page that several processes share counts once.

    Raises: SimulationError with the end of its output when the command fails.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        )
        peak, most = 0, 0
        if watch_memory:
            peak, most = _watch(process)
        code = process.wait()
        seconds = time.perf_counter() - started
        output.seek(0)
        text = output.read()
    if code != 0:
        raise SimulationError(f"{' '.join(command)} ended with {code}: {text.strip()[-1500:]}")
    return Ran(seconds=seconds, peak_bytes=peak, processes=most, output=text)


def python(module: str, *arguments: str) -> list[str]:
    """The command that runs a module with this interpreter."""
    return [sys.executable, "-m", module, *arguments]


def last_line(output: str) -> str:
    """The last line that is not empty: what a measuring process has to say."""
    return output.strip().splitlines()[-1]


def _watch(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> tuple[int, int]:
    peak, most = 0, 0
    # Ray's processes may outlive their parent and lose it: whoever was in the tree once stays in.
    tree: set[int] = set()
    while process.poll() is None:
        tree = tree_of(process.pid, tree)
        sizes = [size for size in map(pss_bytes, tree) if size]
        peak, most = max(peak, sum(sizes)), max(most, len(sizes))
        time.sleep(SAMPLE_EVERY_S)
    return peak, most


def tree_of(root: int, before: Collection[int] = ()) -> set[int]:
    """`root`, its descendants, those of `before` that still live, and theirs."""
    children: dict[int, list[int]] = {}
    alive = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # "pid (name) state ppid ...", where the name may hold anything, brackets too
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            continue
        alive.add(int(entry.name))
        children.setdefault(parent, []).append(int(entry.name))
    found: set[int] = set()
    waiting = [root, *alive.intersection(before)]
    while waiting:
        number = waiting.pop()
        if number not in found:
            found.add(number)
            waiting += children.get(number, [])
    return found


def pss_bytes(number: int) -> int:
    """A process's proportional set size; 0 for a process that has ended."""
    try:
        for line in Path(f"/proc/{number}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
