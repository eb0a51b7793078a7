# SPDX-License-Identifier: Apache-2.0
"""Who hears what a run does. The faces of it, a live bar and plain lines, are in `fedloom`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Report(Protocol):
    """What a listener reads of a round; `coordinator.rounds.RoundReport` fits."""

    @property
    def round(self) -> int:
        """The round, from 1."""

    @property
    def accuracy(self) -> float | None:
        """Share of right answers, None in a round that was not evaluated."""

    @property
    def uplink_bytes(self) -> int:
        """Bytes that clients sent in this round."""

    @property
    def downlink_bytes(self) -> int:
        """Bytes that clients were sent in this round."""

    @property
    def clients(self) -> int:
        """Clients that were asked to train."""

    @property
    def rejections(self) -> Any:
        """The rejections, or how many there were."""

    @property
    def seconds(self) -> float:
        """What the round took."""

    @property
    def privacy(self) -> Mapping[str, Any]:
        """What a private job has spent; {} for others."""


class ProgressListener(Protocol):
    """Hears what a run does: `start`, one `round` for each, then `finish`; `stage` any time."""

    def start(self, total_rounds: int, clients: int) -> None:
        """The rounds begin."""

    def stage(self, text: str) -> None:
        """Something that takes a while begins."""

    def round(self, report: Report) -> None:
        """A round was committed."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The run is over and its summary written."""


class SilentProgress:
    """A listener that says nothing, for callers that want no output."""

    def start(self, total_rounds: int, clients: int) -> None:
        """Nothing."""

    def stage(self, text: str) -> None:
        """Nothing."""

    def round(self, report: Report) -> None:
        """Nothing."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Nothing."""
