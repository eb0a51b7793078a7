# SPDX-License-Identifier: Apache-2.0
"""A real deployment whose processes are killed while a job runs: it goes on by itself, and comes to
the very tensors of a run that nobody disturbed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

DEVICES, SAMPLES = 3, 40
PARTS = ("everything", "superlink", "gateway", "jobs", "player")


class Coordinator:
    """`fedloom coordinator up`, started again whenever it was killed."""

    def __init__(self, ward: Any) -> None:
        self._ward = ward
        self._held = ExitStack()

    def __enter__(self) -> Coordinator:
        self.process = self._held.enter_context(self._ward.up())
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def kill(self, part: str) -> bool:
        """SIGKILL; whether there was anything to kill."""
        if part == "everything":
            self.process.kill()
            self.process.wait()
            self._held.close()
            self.__enter__()
            return True
        if part == "player":
            pids = _pids_of("coordinator.jobs.process", str(self._ward.folder))
        else:
            state = json.loads((self._ward.folder / "logs" / "processes.json").read_text())
            pids = [pid for pid in [state["processes"][part]["pid"]] if pid]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return bool(pids)


def _pids_of(module: str, deployment: str) -> list[int]:
    """Processes of a module with the deployment's folder in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                if (
                    module in (entry / "cmdline").read_text()
                    and deployment in (entry / "environ").read_text()
                ):
                    found.append(int(entry.name))
    return found


@contextlib.contextmanager
def three_devices(ward: Any, digits: Callable[..., Path]) -> Iterator[dict[str, Path]]:
    """Enrolled and running; names and data."""
    with ExitStack() as stack:
        told = ward.token(quota=DEVICES)
        devices = {}
        for number in range(DEVICES):
            data = digits(number, SAMPLES)
            devices[ward.enroll(number, told)] = data
            stack.enter_context(ward.running(number, data))
        yield devices


def stateful_job(tiny_job: Callable[..., Any], rounds: int) -> Any:
    """One whose every round depends on what clients and server kept of the one before."""
    from coordinator.sections import AggregationSection, UpdateSection

    job = tiny_job(
        "lora",
        update=UpdateSection(codec="one-bit", error_feedback=True),
        aggregation=AggregationSection(server_optimizer="adam", server_learning_rate=0.1),
    )
    return replace(job, rounds=replace(job.rounds, count=rounds, min_clients=DEVICES))


def play_under_kills(
    ward: Any,
    digits: Callable[..., Path],
    tiny_job: Callable[..., Any],
    simulated: Callable[..., Mapping[str, np.ndarray]],
    soon: Callable[..., bool],
    *,
    rounds: int,
    kills: list[str],
    seed: int,
    longest_pause_s: float,
) -> None:
    from safetensors.numpy import load_file

    from coordinator.jobs.folder import JobFolder

    rng = random.Random(seed)
    ward.init()
    with Coordinator(ward) as coordinator, three_devices(ward, digits) as devices:
        job = stateful_job(tiny_job, rounds)
        ward.submit(job, "job")
        known = JobFolder(ward.folder / "jobs" / "job")
        assert soon(lambda: known.state().round == 1, 120), ward.logs()
        for number, part in enumerate(kills):
            time.sleep(rng.uniform(0.5, longest_pause_s))
            # A player that is not there yet is waited for: it is what the job is about.
            assert soon(lambda part=part: coordinator.kill(part), 120), ward.logs()
            assert known.state().doing != "finished", f"it was over before kill {number + 1}"
        folder = ward.finish("job", seconds=60 + 40 * rounds)
        found = load_file(folder / "adapter" / "adapter_model.safetensors")
        found = {key.removeprefix("base_model.model."): v for key, v in found.items()}
        for key, value in simulated(job, folder, devices).items():
            np.testing.assert_array_equal(found[key], value, err_msg=key)
        with contextlib.closing(sqlite3.connect(folder / "journal.sqlite")) as db:
            counted = db.execute("SELECT round, client FROM updates ORDER BY 1, 2").fetchall()
        names = sorted(devices)
        assert counted == [(number, name) for number in range(1, rounds + 1) for name in names]
        summary = json.loads((folder / "summary.json").read_text())
        assert (summary["rounds"], summary["rejections"]) == (rounds, 0)
        starts = ward.job("job")["starts"]
        assert starts > 1, "no kill was felt"
        print(f"kill_nine_survived: {len(kills)} kills in {rounds} rounds, {starts} starts")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_survives_kills_of_its_coordinator(
    ward: Any, digits: Any, tiny_job: Any, simulated: Any, soon: Any
) -> None:
    kills = ["player", "everything"]
    play_under_kills(
        ward, digits, tiny_job, simulated, soon,
        rounds=3, kills=kills, seed=1, longest_pause_s=8.0,
    )  # fmt: skip


@pytest.mark.chaos
@pytest.mark.timeout(7200)
def test_fifty_kills_in_twenty_rounds(
    ward: Any, digits: Any, tiny_job: Any, simulated: Any, soon: Any
) -> None:
    kills = [PARTS[number % len(PARTS)] for number in range(50)]
    random.Random(2).shuffle(kills)
    play_under_kills(
        ward, digits, tiny_job, simulated, soon,
        rounds=20, kills=kills, seed=2, longest_pause_s=12.0,
    )  # fmt: skip
