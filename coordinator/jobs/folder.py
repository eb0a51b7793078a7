# SPDX-License-Identifier: Apache-2.0
"""What lies on disk of one job of a deployment.

jobs/NAME/
├── job.toml               the job, complete
├── bundle/                compiled and signed: what devices fetch, never changed
├── body/                  of a split job: the server's graphs
├── own.json               the coordinator's own samples in words, and what a step costs
├── test.safetensors       those samples, if it has any; validation.safetensors to choose by
├── journal.sqlite         every committed round
├── state.json             what it is doing now
├── job.log
├── metrics.jsonl          ┐
├── summary.json           │
├── report.html            │ when its rounds are over, as a simulation leaves them
├── adapter/               │
└── predict/               ┘ a signed bundle that only predicts; a split network has none
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from coordinator.errors import DeploymentError
from protocol.owned_files import write_whole

_MAX_STATE_BYTES: Final = 1 << 20
_PATIENCE_STEP_S: Final = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """What a job is doing, as far as it said; for people and `status`."""

    doing: str = "queued"
    """"queued", "starting", "asking", "waiting", "training", "finishing", "finished", "stopped",
    "failed"."""
    round: int = 0
    rounds: int = 0
    why: str = ""  # of waiting and failing, in words
    asked: tuple[str, ...] = ()
    answered: tuple[str, ...] = ()
    not_asked: Mapping[str, str] = field(default_factory=dict)  # device to reason
    privacy: Mapping[str, Any] = field(default_factory=dict)  # as in RoundReport; {}: none
    since: float = 0.0  # seconds since 1970


class JobFolder:
    """The paths of one job, and the little that is read and written here."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __eq__(self, other: object) -> bool:
        return isinstance(other, JobFolder) and self.path == other.path

    def __hash__(self) -> int:
        return hash(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def job(self) -> Path:
        return self.path / "job.toml"

    @property
    def bundle(self) -> Path:
        return self.path / "bundle"

    @property
    def predict(self) -> Path:
        return self.path / "predict"

    @property
    def body(self) -> Path:
        return self.path / "body"

    @property
    def own(self) -> Path:
        return self.path / "own.json"

    @property
    def journal(self) -> Path:
        return self.path / "journal.sqlite"

    @property
    def outstanding(self) -> Path:
        return self.path / "outstanding.sqlite"

    @property
    def log(self) -> Path:
        return self.path / "job.log"

    def samples(self, which: str) -> dict[str, np.ndarray]:
        """The coordinator's own, "test" or "validation"; {} if it has none."""
        from safetensors.numpy import load_file

        path = self.path / f"{which}.safetensors"
        return dict(load_file(path)) if path.exists() else {}

    def state(self) -> JobState:
        """What it said last."""
        try:
            with (self.path / "state.json").open("rb") as file:
                found = json.loads(file.read(_MAX_STATE_BYTES))
        except FileNotFoundError:
            return JobState()
        except (OSError, ValueError) as error:
            raise DeploymentError(f"{self.path / 'state.json'}: cannot be read ({error})") from None
        lists = {name: tuple(found[name]) for name in ("asked", "answered")}
        return JobState(**{**found, **lists})

    def say(self, state: JobState) -> None:
        """Replace what it said last."""
        content: dict[str, Any] = {**asdict(state), "since": state.since or time.time()}
        text = json.dumps(content, allow_nan=False, indent=2) + "\n"
        write_whole(self.path / "state.json", text.encode())

    @contextmanager
    def playing(self, *, patience_s: float = 0.0) -> Iterator[bool]:
        """Whether this process is the one that plays the job; it is until the context ends."""
        descriptor = os.open(self.path / "player.lock", os.O_RDWR | os.O_CREAT, 0o600)
        last = time.monotonic() + patience_s
        try:
            while not (mine := _locks(descriptor)) and time.monotonic() < last:
                time.sleep(_PATIENCE_STEP_S)
            yield mine
        finally:
            os.close(descriptor)

    def is_played(self) -> bool:
        """Whether a process plays it now."""
        with self.playing() as free:
            return not free


def _locks(descriptor: int) -> bool:
    """The kernel lets go of it when the process ends, however it ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
