# SPDX-License-Identifier: Apache-2.0
"""A real deployment whose processes are killed while a job runs: it goes on by itself, and comes to
the very tensors of a run that nobody disturbed. `make chaos` runs it; test_end_to_end.py has one
kill, and tests/coordinator/test_round_crashes.py plays the round engine under many."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sqlite3
import time
from collections.abc import Callable, Mapping
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
            pids = self._ward.pids_of("coordinator.jobs.process")
        else:
            state = json.loads((self._ward.folder / "logs" / "processes.json").read_text())
            pids = [pid for pid in [state["processes"][part]["pid"]] if pid]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return bool(pids)


class Devices:
    """Three of them, enrolled and running, until the context ends."""

    def __init__(self, ward: Any, digits: Callable[..., Path]) -> None:
        self._ward = ward
        self._data = [digits(number, SAMPLES) for number in range(DEVICES)]
        self._held = [ExitStack() for _ in range(DEVICES)]
        self._processes: dict[int, Any] = {}

    def __enter__(self) -> Devices:
        told = self._ward.token(quota=DEVICES)
        self.names = [self._ward.enroll(number, told) for number in range(DEVICES)]
        for number in range(DEVICES):
            self._start(number)
        return self

    def __exit__(self, *_: object) -> None:
        for held in self._held:
            held.close()

    @property
    def data(self) -> dict[str, Path]:
        return dict(zip(self.names, self._data, strict=True))

    def kill(self, name: str) -> None:
        """SIGKILL for the device, whose own processes go with it; it is started again at once."""
        number = self.names.index(name)
        self._processes[number].kill()
        self._processes[number].wait()
        self._held[number].close()
        self._start(number)

    def _start(self, number: int) -> None:
        running = self._ward.running(number, self._data[number])
        self._processes[number] = self._held[number].enter_context(running)


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
    device_rounds: int = 0,
) -> None:
    from safetensors.numpy import load_file

    from coordinator.jobs.folder import JobFolder

    rng = random.Random(seed)
    ward.init()
    with Coordinator(ward) as coordinator, Devices(ward, digits) as devices:
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
        for key, value in simulated(job, folder, devices.data).items():
            np.testing.assert_array_equal(found[key], value, err_msg=key)
        with contextlib.closing(sqlite3.connect(folder / "journal.sqlite")) as db:
            counted = db.execute("SELECT round, client FROM updates ORDER BY 1, 2").fetchall()
        names = sorted(devices.names)
        assert counted == [(number, name) for number in range(1, rounds + 1) for name in names]
        summary = json.loads((folder / "summary.json").read_text())
        assert (summary["rounds"], summary["rejections"]) == (rounds, 0)
        starts = ward.job("job")["starts"]
        assert starts > 1, "no kill was felt"
        print(f"kill_nine_survived: {len(kills)} kills in {rounds} rounds, {starts} starts")
        if device_rounds:
            job = quick_job(tiny_job, device_rounds)
            play_under_device_kills(ward, devices, job, seed=seed)


def play_under_device_kills(ward: Any, devices: Devices, job: Any, *, seed: int) -> None:
    """In every round one device of three is killed while it should be at work."""
    from coordinator.jobs.folder import JobFolder

    rng = random.Random(seed)
    rounds = job.rounds.count
    ward.submit(job, "devices")
    known = JobFolder(ward.folder / "jobs" / "devices")
    killed_in: set[int] = set()
    last = time.monotonic() + 60 + 90 * rounds
    while (state := known.state()).doing not in ("finished", "failed"):
        assert time.monotonic() < last, f"{state}\n{ward.logs()}"
        if state.doing == "training" and state.round not in killed_in:
            time.sleep(rng.uniform(0.0, 3.0))
            at_work = [name for name in state.asked if name not in known.state().answered]
            if at_work and known.state().round == state.round:
                devices.kill(rng.choice(at_work))
                killed_in.add(state.round)
        time.sleep(0.05)
    folder = ward.finish("devices")
    with contextlib.closing(sqlite3.connect(folder / "journal.sqlite")) as db:
        counted = db.execute("SELECT round, client FROM updates").fetchall()
        nonces = db.execute("SELECT count(DISTINCT nonce) FROM updates").fetchone()[0]
        (committed,) = db.execute("SELECT count(*) FROM rounds WHERE committed > 0").fetchone()
    assert committed == rounds
    assert len(counted) == len(set(counted)) == nonces, "nothing counts twice"
    assert {number for number, _ in counted} == set(range(1, rounds + 1)), "each round has updates"
    assert len(killed_in) >= rounds - 1, f"a device was killed in {len(killed_in)} rounds only"
    print(f"device_kill_survived: {committed} of {rounds} rounds, {len(killed_in)} kills, "
          f"{len(counted)} of {DEVICES * rounds} updates")  # fmt: skip


def quick_job(tiny_job: Callable[..., Any], rounds: int) -> Any:
    """A round begins with all three devices, and needs two of them."""
    job = tiny_job("lora")
    return replace(job, rounds=replace(job.rounds, count=rounds, min_clients=DEVICES, quorum=2))


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_twenty_rounds_with_a_third_of_the_devices_killed_in_each(
    ward: Any, digits: Any, tiny_job: Any
) -> None:
    ward.init()
    with ward.up(), Devices(ward, digits) as devices:
        play_under_device_kills(ward, devices, quick_job(tiny_job, 20), seed=3)


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_jobs_survive_kills_of_the_coordinator_and_of_devices(
    ward: Any, digits: Any, tiny_job: Any, simulated: Any, soon: Any
) -> None:
    kills = ["player", "everything"]
    play_under_kills(
        ward, digits, tiny_job, simulated, soon,
        rounds=2, kills=kills, seed=1, longest_pause_s=8.0, device_rounds=2,
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
        rounds=20, kills=kills, seed=2, longest_pause_s=15.0,
    )  # fmt: skip
