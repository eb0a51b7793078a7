# SPDX-License-Identifier: Apache-2.0
"""Keeps the jobs that are wanted playing: asks SuperLink for a run of each that nobody plays.

A run of Flower's ends for good with the process that plays it, and with SuperLink. A job does not:
its journal says where to go on. Whether a job is played is known by the lock that its player holds,
which a crash releases.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from coordinator.deployment import Deployment
from coordinator.errors import RegistryError, SuperLinkError
from coordinator.jobs.folder import JobFolder
from coordinator.jobs.registry import JobEntry

_LOOK_S: Final = 0.5
_BEGIN_S: Final = 60.0  # from a run that was asked for to its player's lock
_FIRST_PAUSE_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 15.0

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Trying:
    """What was tried for one job."""

    pause_s: float = _FIRST_PAUSE_S
    not_before: float = 0.0  # by the monotonic clock
    round: int = -1  # where it stood when it was last begun


class JobService:
    """The jobs of a deployment, `together` at a time in the order of their submission."""

    def __init__(
        self,
        deployment: Deployment,
        start: Callable[[str], object],
        *,
        together: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`start` has a job's player started; it may raise SuperLinkError."""
        self._deployment = deployment
        self._start = start
        self._together = together
        self._clock = clock
        self._trying: dict[str, _Trying] = {}

    def run(self, stop: threading.Event) -> None:
        """Until `stop` is set."""
        while not stop.wait(_LOOK_S):
            try:
                self.look()
            except (RegistryError, OSError):
                # A full disk, mostly; what is wanted stays in the registry.
                _log.exception("jobs cannot be looked after; it is tried again")

    def look(self) -> None:
        """Have begun what should be playing and is not. Raises: RegistryError, OSError."""
        due = [entry for entry in self._deployment.jobs.all() if entry.due]
        for entry in due[: self._together]:
            folder = JobFolder(self._deployment.jobs_folder / entry.name)
            if not folder.is_played():
                self._begin(entry, folder)

    def _begin(self, entry: JobEntry, folder: JobFolder) -> None:
        trying = self._trying.setdefault(entry.name, _Trying())
        now = self._clock()
        if now < trying.not_before:
            return
        state = folder.state()
        if state.round > trying.round:
            # It got on since it was last begun: whatever ended it is not in its way for good.
            trying.pause_s = _FIRST_PAUSE_S
        trying.round = state.round
        try:
            self._start(entry.name)
        except SuperLinkError as error:
            _log.warning("job %s: cannot be begun yet: %s", entry.name, error)
            why = f"it cannot be begun yet: {error}"
            folder.say(replace(state, doing="waiting", why=why, since=time.time()))
        else:
            _log.info("job %s: a run was asked for", entry.name)
            end = self._clock() + _BEGIN_S
            while self._clock() < end and not folder.is_played() and self._still_due(entry):
                time.sleep(_LOOK_S / 5)
        trying.not_before = self._clock() + trying.pause_s
        trying.pause_s = min(2 * trying.pause_s, _LONGEST_PAUSE_S)

    def _still_due(self, entry: JobEntry) -> bool:
        found = self._deployment.jobs.by_name(entry.name)
        return found is not None and found.due


def serve_jobs(folder: Path, start_for: Callable[[Deployment], Callable[[str], object]]) -> None:
    """Look after a deployment's jobs until SIGTERM or SIGINT; from the main thread."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with Deployment(folder) as deployment:
        JobService(deployment, start_for(deployment)).run(stop)
