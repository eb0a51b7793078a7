# SPDX-License-Identifier: Apache-2.0
"""Processes that are killed while they write: what is read afterwards is the old state or the new.

Run as a script, this file forks writers and kills them: at every line of the code that writes, or
at random instants. It is a process of its own because a fork of pytest would copy its threads.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from client_sdk.memory import FolderMemory
from client_sdk.outbox import SET_ASIDE, Attempt, Outbox, answer_once
from protocol.plan import Plan, pack_plan

ROOT = Path(__file__).parents[2]
WATCHED = {
    str(ROOT / name)
    for name in (
        "client_sdk/durable.py", "client_sdk/memory.py", "client_sdk/outbox.py",
        "protocol/owned_files.py",
    )
}  # fmt: skip
MOST_LINES = 2000
RANDOM_KILLS = 25
JOB = "ab" * 32


@pytest.mark.parametrize(
    "scenario",
    [
        "memory_at_every_line",
        "memory_at_random",
        "outbox_put_at_every_line",
        "outbox_set_aside_at_every_line",
        "outbox_at_random",
        "answer_at_every_line",
    ],
)
def test_state_is_whole_after_a_kill(scenario: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, __file__, scenario, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["killed"] >= 20, "the writers must really be killed on their way"
    # Both must have been met, or the kills came too early or too late to show anything.
    assert found["old"] > 0 and found["new"] > 0, found


# Killing


def killed_at_line(line: int, work: Callable[[], object]) -> bool:
    """Whether a child that does the work was killed as it came to its `line`-th line."""
    child = os.fork()
    if child == 0:
        seen = 0

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal seen
            if frame.f_code.co_filename not in WATCHED:
                return None
            seen += event == "line"
            if seen >= line:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        leave(work)
    return ended(child)


def killed_after(seconds: float, work: Callable[[], object]) -> bool:
    child = os.fork()
    if child == 0:
        leave(work)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return ended(child)


def leave(work: Callable[[], object]) -> None:
    try:
        work()
    except BaseException as error:
        print(f"child: {error!r}", file=sys.stderr)
        os._exit(1)
    os._exit(0)


def ended(child: int) -> bool:
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the child failed by itself"
    return os.WIFSIGNALED(status)


class Tally:
    """How often the old state and the new one were found."""

    def __init__(self) -> None:
        self.killed = self.old = self.new = 0

    def count(self, new: bool) -> None:
        self.killed += 1
        self.new += new
        self.old += not new


def at_every_line(
    folder: Path,
    prepare: Callable[[Path], object],
    work: Callable[[Path], object],
    is_new: Callable[[Path], bool],
) -> Tally:
    """Kill `work` at its first line, its second, and so on; `is_new` checks what is left."""
    tally = Tally()
    # What a killed process wrote is with the kernel, flushed or not.
    os.fsync = lambda descriptor: None
    for line in range(1, MOST_LINES):
        place = folder / str(line)
        prepare(place)
        killed = killed_at_line(line, lambda place=place: work(place))
        if not killed:
            assert is_new(place)
            return tally
        tally.count(is_new(place))
        # What was cut off can be done again, and leaves nothing of the first time.
        work(place)
        assert is_new(place)
        assert not list(place.rglob("*.partial"))
        shutil.rmtree(place)
    raise AssertionError(f"not done after {MOST_LINES} lines")


# The memory


def tensors(value: int, size: int = 50) -> dict[str, np.ndarray]:
    return {"a": np.full(size, value, np.float32), "b": np.full((2, size), -value, np.float32)}


def value_of(found: dict[str, np.ndarray]) -> int:
    """The one value that all of it was written with."""
    value = int(found["a"][0])
    for name, tensor in tensors(value, len(found["a"])).items():
        np.testing.assert_array_equal(found[name], tensor)
    return value


def memory_at_every_line(folder: Path) -> Tally:
    def prepare(place: Path) -> None:
        for number in (1, 2):
            FolderMemory(place).save("personal", number, tensors(number))

    def is_new(place: Path) -> bool:
        memory = FolderMemory(place)
        assert value_of(memory.latest("personal", before=3)) == 2, "a replay needs the old state"
        return value_of(memory.latest("personal", before=4)) == 3

    return at_every_line(
        folder, prepare, lambda place: FolderMemory(place).save("personal", 3, tensors(3)), is_new
    )


def memory_at_random(folder: Path) -> Tally:
    rng, tally = random.Random(1), Tally()
    memory = FolderMemory(folder / "memory")
    reported = folder / "saved"
    last = 0

    def work() -> None:
        with reported.open("wb", buffering=0) as report:
            for number in range(last + 1, last + 10_000):
                memory.save("residual", number, tensors(number, 100_000))
                report.write(b"%d\n" % number)

    for _ in range(RANDOM_KILLS):
        reported.write_bytes(b"")
        assert killed_after(rng.uniform(0.002, 0.04), work)
        saved = int((reported.read_bytes().split() or [b"%d" % last])[-1])
        found = memory.latest("residual", before=1 << 30)
        value = value_of(found) if found else 0
        assert value in (saved, saved + 1), "what was saved is there, or already its successor"
        tally.count(value > last)
        last = value
    return tally


# The outbox


def attempt_of(number: int, job: str = JOB) -> Attempt:
    return Attempt(job=job, round=number, nonce=f"{number:016x}")


def update_of(number: int, size: int = 400) -> bytes:
    return random.Random(number).randbytes(size)


def read_all(outbox: Outbox) -> set[int]:
    """The rounds of the entries, after checking each."""
    rounds = [entry.attempt.round for entry in outbox.entries()]
    assert len(set(rounds)) == len(rounds), "an update is kept once"
    for number in rounds:
        assert outbox.get(attempt_of(number), b"plan") == update_of(number)
    return set(rounds)


def outbox_put_at_every_line(folder: Path) -> Tally:
    def opened(place: Path) -> Outbox:
        return Outbox(place, max_bytes=1000)  # two updates

    def prepare(place: Path) -> None:
        for number in (1, 2):
            opened(place).put(attempt_of(number), b"plan", update_of(number))

    def work(place: Path) -> None:
        outbox = opened(place)
        outbox.put(attempt_of(3), b"plan", update_of(3))
        outbox.finish(JOB)
        outbox.settle(JOB, before=3)

    def is_new(place: Path) -> bool:
        rounds = read_all(opened(place))
        # The oldest goes before the newest comes, the second once it is settled.
        assert rounds in ({1, 2}, {2}, {2, 3}, {3})
        return 3 in rounds

    return at_every_line(folder, prepare, work, is_new)


def outbox_set_aside_at_every_line(folder: Path) -> Tally:
    def prepare(place: Path) -> None:
        outbox = Outbox(place)
        for number in (1, 2):
            outbox.put(attempt_of(number), b"plan", update_of(number))
        (path,) = (e.path for e in outbox.entries() if e.attempt.round == 2)
        path.write_bytes(path.read_bytes()[:-1])

    def work(place: Path) -> None:
        assert Outbox(place).get(attempt_of(2), b"plan") is None

    def is_new(place: Path) -> bool:
        aside = place / SET_ASIDE
        moved = aside.is_dir() and any(path.suffix == ".update" for path in aside.iterdir())
        assert len(Outbox(place).entries()) == (1 if moved else 2)
        assert Outbox(place).get(attempt_of(1), b"plan") == update_of(1)
        return moved

    return at_every_line(folder, prepare, work, is_new)


def outbox_at_random(folder: Path) -> Tally:
    rng, tally = random.Random(2), Tally()
    place, reported = folder / "outbox", folder / "kept"
    last = 0

    def work() -> None:
        outbox = Outbox(place)
        with reported.open("wb", buffering=0) as report:
            for number in range(last + 1, last + 10_000):
                outbox.put(attempt_of(number), b"plan", update_of(number, 100_000))
                report.write(b"%d\n" % number)

    for _ in range(RANDOM_KILLS):
        reported.write_bytes(b"")
        assert killed_after(rng.uniform(0.002, 0.04), work)
        kept = int((reported.read_bytes().split() or [b"%d" % last])[-1])
        outbox = Outbox(place)
        rounds = sorted(entry.attempt.round for entry in outbox.entries())
        assert rounds in (list(range(1, kept + 1)), list(range(1, kept + 2)))
        for number in rounds[last:]:
            assert outbox.get(attempt_of(number), b"plan") == update_of(number, 100_000)
        tally.count(len(rounds) > last)
        last = len(rounds)
    return tally


def answer_at_every_line(folder: Path) -> Tally:
    plan = Plan(
        job=JOB,
        round=3,
        nonce="cd" * 16,
        client="c1",
        downlink_codec="float32",
        uplink_codec="float32",
        task="fit",
        learning_rate=0.5,
        local_epochs=1,
        seed=9,
        max_update_bytes=10_000,
    )
    blob = pack_plan(plan, b"")

    def prepare(place: Path) -> None:
        FolderMemory(place / "memory").save("residual", 2, tensors(2))
        Outbox(place / "outbox").put(attempt_of(2), b"plan", update_of(2))

    def work(place: Path) -> None:
        memory = FolderMemory(place / "memory")
        trained = place / "trained"

        def answer(_: bytes) -> bytes:
            trained.open("ab", buffering=0).write(b"x")
            before = value_of(memory.latest("residual", before=plan.round))
            memory.save("residual", plan.round, tensors(before + 1))
            return b"update from %d" % before

        assert answer_once(blob, Outbox(place / "outbox"), answer) == b"update from 2"

    def is_new(place: Path) -> bool:
        entries = Outbox(place / "outbox").entries()
        rounds = [entry.attempt.round for entry in entries]
        assert rounds in ([2], [], [3])
        trained = place / "trained"
        times = len(trained.read_bytes()) if trained.exists() else 0
        # Killed before its update was kept, it is trained again; never afterwards.
        assert times <= 2
        return rounds == [3]

    return at_every_line(folder, prepare, work, is_new)


if __name__ == "__main__":
    counted = globals()[sys.argv[1]](Path(sys.argv[2]))
    print(json.dumps(vars(counted)))
