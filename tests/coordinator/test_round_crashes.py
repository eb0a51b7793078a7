# SPDX-License-Identifier: Apache-2.0
"""A coordinator and its clients that are killed while they play: nothing is lost, nothing doubled.

Run as a script, this file plays a job in child processes, kills each at a chosen point or a random
instant, and lets the next go on, until one comes to the end. It is a process of its own because a
fork of pytest would copy its threads.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client_sdk.outbox import Outbox, answer_once
from coordinator.job import Job
from coordinator.journal import Journal
from coordinator.link import never
from coordinator.merging import Step
from coordinator.privacy import Privacy
from coordinator.privacy_section import PrivacySection
from coordinator.rounds import run_rounds
from coordinator.sections import (
    AggregationSection,
    DataSection,
    RoundsSection,
    UpdateSection,
)
from protocol.plan import unpack_plan
from protocol.summing import SUM_MAGIC
from protocol.tensors import ParamSpec

ROOT = Path(__file__).parents[2]
CLIENTS = ("ada", "ben", "cyd", "dan", "eve")
ROUNDS = 20
JOB = Job(
    data=DataSection(clients=5, held_out=0.0),
    rounds=RoundsSection(count=ROUNDS, clients_per_round=3, evaluate_every=ROUNDS),
    # What a client keeps between rounds decides its bits, and so does what it was sent last.
    update=UpdateSection(
        codec="one-bit", error_feedback=True, downlink="changes", downlink_codec="one-bit"
    ),
)
ASYNC = Job(
    data=JOB.data,
    rounds=RoundsSection(
        mode="async", count=ROUNDS, buffer=4, concurrency=3, evaluate_every=ROUNDS
    ),
    update=UpdateSection(codec="one-bit"),
)
PRIVATE = Job(
    data=JOB.data,
    rounds=JOB.rounds,
    update=UpdateSection(codec="one-bit", metrics="", downlink="changes", downlink_codec="one-bit"),
    aggregation=AggregationSection(weighting="uniform"),
    privacy=PrivacySection(
        mode="central", noise_multiplier=1.0, clip=0.5, sampling="without-replacement"
    ),
)
SUMMED = Job(
    data=JOB.data,
    rounds=JOB.rounds,
    update=UpdateSection(codec="grid:8,0.5", metrics=""),
    aggregation=AggregationSection(weighting="uniform"),
    privacy=PrivacySection(
        mode="central", noise_multiplier=1.0, clip=0.6, sampling="without-replacement",
        secure_aggregation=True,
    ),
)  # fmt: skip
JOBS = {"async": ASYNC, "private": PRIVATE, "summed": SUMMED}
POINTS = (
    "begin before", "begin after", "plans out", "trained", "replace before", "replace after",
    "answer before", "answer after", "add before", "finish before", "finish after",
    "commit before", "commit within", "commit after",
)  # fmt: skip
# Between a client's opening of a sum and the line that has it in the journal there is no going on
# to the same bits: test_summed_rounds.py says to what instead.
SUM_POINTS = (
    "begin before", "begin after", "plans out", "trained", "answer before", "answer after",
    "sum after", "finish before", "finish after", "commit before", "commit within", "commit after",
)  # fmt: skip


def run_script(kind: str, kills: int, folder: Path, timeout: float) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, kind, str(kills), str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def check(found: dict[str, Any]) -> None:
    assert found["bits"] == found["undisturbed"], "every round has the bits of the undisturbed run"
    assert [round for round, _ in found["counted"]] == list(range(1, ROUNDS + 1))
    for _, clients in found["counted"]:
        assert len(clients) == len(set(clients)) == 3
    assert found["left"] == 0, "no answer outlives its round"


def test_a_private_run_that_is_killed_is_charged_once_a_round_and_has_the_same_noise(
    tmp_path: Path,
) -> None:
    found = run_script("private", len(POINTS), tmp_path, 120)
    check(found)
    assert found["kills"] >= len(POINTS)
    assert found["charges"] == [[number, ""] for number in range(1, ROUNDS + 1)]


@pytest.mark.long
def test_a_run_of_secure_sums_that_is_killed_gives_the_bits_of_an_undisturbed_one(
    tmp_path: Path,
) -> None:
    found = run_script("summed", len(SUM_POINTS), tmp_path, 120)
    check(found)
    assert found["kills"] >= len(SUM_POINTS)
    assert found["charges"] == [[number, ""] for number in range(1, ROUNDS + 1)]


@pytest.mark.parametrize("kind", ["points", "random"])
def test_a_run_that_is_killed_gives_the_bits_of_an_undisturbed_one(
    kind: str, tmp_path: Path
) -> None:
    found = run_script(kind, len(POINTS) if kind == "points" else 6, tmp_path, 120)
    check(found)
    assert found["kills"] >= 6


def check_async(found: dict[str, Any]) -> None:
    """Not the bits, which depend on who answers when; but every step, and every update once."""
    assert [number for number, _ in found["counted"]] == list(range(1, ROUNDS + 1))
    assert [len(clients) for _, clients in found["counted"]] == [ASYNC.rounds.buffer] * ROUNDS
    assert found["lost"] == [], "whatever was written down is used"
    assert found["left"] == 0


def test_an_asynchronous_run_that_is_killed_keeps_its_steps_and_counts_nothing_twice(
    tmp_path: Path,
) -> None:
    found = run_script("async", 12, tmp_path, 120)
    check_async(found)
    assert found["kills"] >= 12


@pytest.mark.chaos
def test_an_asynchronous_run_is_killed_fifty_times(tmp_path: Path) -> None:
    found = run_script("async", 50, tmp_path, 280)
    check_async(found)
    assert found["kills"] >= 50


@pytest.mark.chaos
def test_a_run_that_is_killed_fifty_times_gives_the_bits_of_an_undisturbed_one(
    tmp_path: Path,
) -> None:
    for kind in ("points", "random"):
        (tmp_path / kind).mkdir()
        found = run_script(kind, 50, tmp_path / kind, 280)
        check(found)
        assert found["kills"] >= 50


# Playing


def play(folder: Path, job: Job = JOB) -> None:
    """Both sides of a job, from where their folders stand."""
    from conftest import INITIAL, SummingLink

    class Link(SummingLink):
        def _answer(self, client: str, plan: bytes) -> Any:
            if plan.startswith(SUM_MAGIC):
                return super()._answer(client, plan)
            outbox = Outbox(folder / "outboxes" / client)
            inner = super()._answer

            def answer(blob: bytes) -> bytes:
                update = inner(client, blob)
                assert isinstance(update, bytes), update
                reached("trained")
                return update

            return answer_once(plan, outbox, answer)

        def exchange(self, outgoing: Any, *, closed: Any = never) -> Any:
            if job is not ASYNC:
                yield from super().exchange(outgoing, closed=closed)
                return
            # Whoever was asked last answers first: some updates are old when they come.
            waiting: list[Any] = []
            for message in outgoing:
                if message is not None:
                    waiting.append(message)
                    continue
                reached("plans out")
                last = waiting.pop(-1 if len(waiting) % 2 else 0)
                answer = self._answer(last.client, last.blob)
                noted = unpack_plan(last.blob, max_bytes=10**6)[0].nonce
                yield last.client, answer
                # The round loop has gone on: it has this one in its journal.
                with (folder / "handed-over").open("a") as file:
                    file.write(f"{noted}\n")

    def order(clients: list[str]) -> list[str]:
        reached("plans out")
        return clients[::-1]

    link = Link(job, CLIENTS, memory=folder / "memory", order=order)
    with Journal(folder / "journal", keep_tensors=0, keep_answers=True) as journal:
        journal._db.set_trace_callback(
            lambda sql: reached("commit within") if sql.startswith("DELETE FROM answers") else None
        )
        run_rounds(
            job, ParamSpec.of(INITIAL), INITIAL, link, journal, lambda report: None,
            lambda tensors, offset: {}, seeds=seed_of, credentials=link.credentials,
        )  # fmt: skip


def seed_of(number: int) -> bytes:
    """Secret in earnest; here runs are compared. A round's is asked for once, or is not used."""
    return number.to_bytes(32, "little")


def reached(point: str) -> None:
    """Where the child that is to be killed there is killed."""


def watch_points() -> None:
    """Let the calls that matter say when they begin and end."""

    def around(owner: Any, name: str, point: str) -> None:
        inner = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            reached(f"{point} before")
            result = inner(*args, **options)
            reached(f"{point} after")
            return result

        setattr(owner, name, call)

    around(Journal, "begin_round", "begin")
    around(Journal, "keep_answer", "answer")
    around(Journal, "keep_sum", "sum")
    around(Journal, "commit_round", "commit")
    around(Step, "add", "add")
    around(Step, "finish", "finish")
    around(os, "replace", "replace")


# Killing


def killed(work: Callable[[], object], at: tuple[str, int] | float) -> bool:
    """Whether a child that does the work was killed: when it had reached a point so many times, or
    after so many seconds."""
    child = os.fork()
    if child == 0:
        global reached
        if isinstance(at, tuple):
            left = at[1]

            def reached(point: str) -> None:
                nonlocal left
                left -= point == at[0]
                if left <= 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            work()
        except BaseException as error:
            print(f"child: {error!r}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    if isinstance(at, float):
        time.sleep(at)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the child failed by itself"
    return os.WIFSIGNALED(status)


def bits(folder: Path, job: Job) -> list[str]:
    """The tensors of every committed round."""
    with Journal(folder / "journal", keep_tensors=0) as journal:
        found = [journal.tensors(job.hash(), number) for number in range(1, ROUNDS + 1)]
    return [
        "".join(tensors[name].tobytes().hex() for name in sorted(tensors)) if tensors else ""
        for tensors in found
    ]


def main(kind: str, kills: int, folder: Path) -> dict[str, Any]:
    # What a killed process wrote is with the kernel, flushed or not.
    os.fsync = lambda descriptor: None  # type: ignore[assignment]
    watch_points()
    rng = random.Random(7)
    (folder / "undisturbed").mkdir()
    started = time.monotonic()
    job, points = JOBS.get(kind, JOB), SUM_POINTS if kind == "summed" else POINTS
    if privacy := Privacy.of(job):
        # What children would each compute anew.
        charges = [privacy.charge(number, {}, bytes(32)) for number in range(1, ROUNDS + 1)]
        assert all(privacy.affords(charges[:number], number + 1) for number in range(ROUNDS))
    undisturbed = JOB if job is ASYNC else job
    assert not killed(lambda: play(folder / "undisturbed", undisturbed), ("never", 1))
    whole = time.monotonic() - started
    died = 0
    while died < kills:
        place = folder / f"disturbed-{died}"
        place.mkdir()
        dead_here = 0
        while True:
            at: tuple[str, int] | float
            if dead_here >= kills:
                at = ("never", 1)
            elif kind in ("points", "private", "summed") or (kind == "async" and dead_here % 3):
                point = points[dead_here % len(points)]
                at = (point, rng.randint(1, 6))
            else:
                at = rng.uniform(0.0, whole / 4)
            if not killed(lambda place=place: play(place, job), at):
                break
            dead_here += 1
        died += dead_here
        if job is not ASYNC:
            same = bits(place, job) == bits(folder / "undisturbed", job)
            assert same, f"after {dead_here} kills"
    with Journal(place / "journal", keep_tensors=0) as journal:
        rows = journal._db.execute("SELECT round, client FROM updates ORDER BY round").fetchall()
        left = len(journal.kept_answers(job.hash()))
        charged = [(one.round, one.seed.hex()) for one in journal.charges(job.hash())]
        over = place / "handed-over"
        nonces = over.read_text().split() if over.exists() else []
        lost = [nonce for nonce in nonces if not journal.counted(nonce)]
    numbers = sorted({round for round, _ in rows})
    return {
        "kills": died,
        "bits": bits(place, undisturbed),
        "undisturbed": bits(folder / "undisturbed", undisturbed),
        "charges": charged,
        "counted": [[n, [client for round, client in rows if round == n]] for n in numbers],
        "left": left,
        "lost": lost,
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))))
