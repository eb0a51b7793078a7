# SPDX-License-Identifier: Apache-2.0
"""How long work shows itself: a live bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from reports.units import bytes_text, duration_text, privacy_words
from simulations.progress import ProgressListener, Report, SilentProgress

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["PlainProgress", "ProgressListener", "RichProgress", "SilentProgress", "progress_on"]


class PlainProgress:
    """One line for each stage and round, for logs and pipes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._tally = _Tally(0)

    def start(self, total_rounds: int, clients: int) -> None:
        """Names the amount of work."""
        self._tally = _Tally(total_rounds)
        self._say(f"{total_rounds} rounds over {clients} clients")

    def stage(self, text: str) -> None:
        """The text itself."""
        self._say(text)

    def round(self, report: Report) -> None:
        """Round, accuracy, bytes so far, clients a second and time left."""
        self._tally.add(report)
        self._say(f"round {report.round}/{self._tally.total}  {self._tally.text(report)}")

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Nothing: the command prints the result itself."""

    def _say(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


class RichProgress:
    """A live bar with round, accuracy, bytes, clients a second and time left."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console

        self._console = Console(file=stream)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._tally = _Tally(0)

    def start(self, total_rounds: int, clients: int) -> None:
        """Opens the bar."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self.close()
        self._tally = _Tally(total_rounds)
        self._bar = Progress(
            TextColumn("round"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[state]}"),
            console=self._console,
        )
        self._task = self._bar.add_task(
            "rounds", total=total_rounds, state=f"over {clients} clients"
        )
        self._bar.start()

    def stage(self, text: str) -> None:
        """A dim line above the bar."""
        self._console.print(text, style="dim", markup=False, highlight=False)

    def round(self, report: Report) -> None:
        """Moves the bar on."""
        if self._bar is None or self._task is None:
            raise RuntimeError("progress: round() came before start()")
        self._tally.add(report)
        self._bar.update(self._task, completed=report.round, state=self._tally.text(report))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Leaves the full bar standing."""
        self.close()

    def close(self) -> None:
        """Gives the terminal back, also after a failure."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class _Tally:
    """What adds up over rounds, and how it reads."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._began = time.monotonic()
        self._rounds = 0
        self._up = 0
        self._down = 0
        self._accuracy: float | None = None

    def add(self, report: Report) -> None:
        self._rounds += 1
        self._up += report.uplink_bytes
        self._down += report.downlink_bytes
        if report.accuracy is not None:
            self._accuracy = report.accuracy

    def text(self, report: Report) -> str:
        accuracy = "-" if self._accuracy is None else f"{self._accuracy:.4f}"
        rejections = report.rejections
        refused = rejections if isinstance(rejections, int) else len(rejections)
        a_round = (time.monotonic() - self._began) / self._rounds
        parts = [
            f"accuracy {accuracy}",
            privacy_words(report.privacy),
            f"up {bytes_text(self._up)}",
            f"down {bytes_text(self._down)}",
            f"{report.clients / max(report.seconds, 1e-9):.1f} clients/s",
            f"{refused} rejected" if refused else "",
            f"left {duration_text(a_round * max(self.total - report.round, 0))}",
        ]
        return "  ".join(part for part in parts if part)


@contextmanager
def progress_on(stream: TextIO | None = None) -> Iterator[ProgressListener]:
    """The bar if `stream` (stderr if None) is a terminal, plain lines if not; closed afterwards."""
    chosen = sys.stderr if stream is None else stream
    if not chosen.isatty():
        yield PlainProgress(chosen)
        return
    bar = RichProgress(chosen)
    try:
        yield bar
    finally:
        bar.close()
