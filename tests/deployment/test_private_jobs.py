# SPDX-License-Identifier: Apache-2.0
"""Private jobs over a real deployment, alone and with secure sums, whose devices or whose player
are killed in mid-round: every round is charged for once, and what it cost is shown wherever the
documentation says. `make chaos` runs it; tests/coordinator/test_summed_rounds.py plays such rounds
over clients in this process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

DEVICES, SAMPLES, ROUNDS = 4, 40, 2
DELTA, BUDGET = 1e-3, 12.0
JOBS: dict[str, dict[str, Any]] = {
    "central": {"codec": "int8", "clip": 0.5},
    "sums": {"codec": "grid:8,1.0", "clip": 1.2, "secure": True},
    "votes": {"method": "one-bit-adapter", "codec": "votes:0.2", "clip": 0.3, "secure": True},
    "poisson": {"codec": "int8", "clip": 0.5, "sampling": "poisson", "drawn": 2},
    "shares": {"mode": "distributed", "codec": "grid:8,1.0", "clip": 1.2, "secure": True},
    "local": {"mode": "local", "codec": "int8", "clip": 0.5},
}


def job_of(tiny_job: Any, name: str) -> Any:
    from coordinator.privacy_section import PrivacySection
    from coordinator.sections import (
        AggregationSection,
        DataSection,
        RoundsSection,
        UpdateSection,
    )

    options = JOBS[name]
    return tiny_job(
        options.get("method", "ssf"),
        data=DataSection(dataset="digits", clients=DEVICES, max_test_samples=SAMPLES, held_out=0.0),
        rounds=RoundsSection(
            count=ROUNDS, min_clients=DEVICES, clients_per_round=options.get("drawn", 0)
        ),
        update=UpdateSection(codec=options["codec"], metrics=""),
        aggregation=AggregationSection(weighting="uniform"),
        privacy=PrivacySection(
            mode=options.get("mode", "central"),
            epsilon=BUDGET,
            delta=DELTA,
            clip=options["clip"],
            sampling=options.get("sampling", "all"),
            secure_aggregation=options.get("secure", False),
            corrupt=0.0,
        ),
    )


def at_work(folder: Any, name: str) -> bool:
    """A device has been asked to train, and has not answered."""
    state = folder.state()
    return state.doing == "training" and name in state.asked and name not in state.answered


def check_what_was_spent(ward: Any, job: Any, name: str) -> list[int]:
    """In the journal, and wherever it is shown; how many updates each round had."""
    from aggregation.privacy.accountant import epsilon_of
    from coordinator.privacy import Privacy

    folder = ward.finish(name, seconds=600)
    privacy = Privacy.of(job)
    assert privacy is not None
    costs = [epsilon_of(privacy.mechanism, number, DELTA) for number in range(1, ROUNDS + 1)]
    with contextlib.closing(sqlite3.connect(folder / "journal.sqlite")) as db:
        charges = db.execute("SELECT round, seed FROM charges ORDER BY 1").fetchall()
        counted = db.execute("SELECT round, client FROM updates").fetchall()
        rejected = db.execute("SELECT round, client, code, reason FROM rejections").fetchall()
        (sums,) = db.execute("SELECT count(*) FROM sums").fetchone()
        attempts = db.execute("SELECT round, attempts FROM rounds ORDER BY 1").fetchall()
    print(f"{name}: {attempts=}, {counted=}, {rejected=}")
    assert charges == [(number, None) for number in range(1, ROUNDS + 1)]
    assert sums == 0, "what was opened is erased"
    assert len(counted) == len(set(counted)), "nothing counts twice"

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["privacy"]["epsilon"] for line in lines] == pytest.approx(costs)
    for line, cost in zip(lines, costs, strict=True):
        assert line["privacy"]["budget"] == BUDGET
        assert line["privacy"]["left"] == pytest.approx(BUDGET - cost)
        assert line["privacy"]["clip"] == job.privacy.clip
    summary = json.loads((folder / "summary.json").read_text())
    last = lines[-1]["privacy"]
    assert summary["rounds"] == ROUNDS and summary["privacy"].items() >= last.items()
    assert ward.job(name)["privacy"] == last
    said = ward.said("coordinator", "status", ward.folder, "--job", name)
    assert f"epsilon {last['epsilon']:.3f} of {BUDGET:g}" in said
    assert f"clip {job.privacy.clip:.3g}" in said
    shown = ward.metrics()
    for key in ("epsilon", "delta", "budget", "left", "noise_multiplier", "clip"):
        assert shown[f'fedloom_job_{key}{{job="{name}"}}'] == pytest.approx(last[key]), key
    return [sum(number == one for one, _ in counted) for number in range(1, ROUNDS + 1)]


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_private_jobs_are_charged_once_a_round_whoever_is_killed_meanwhile(
    ward: Any, digits: Any, tiny_job: Any, soon: Callable[..., bool]
) -> None:
    from coordinator.jobs.folder import JobFolder

    ward.init()
    with ward.up(), ExitStack() as stack:
        told = ward.token(quota=DEVICES)
        data = [digits(number, SAMPLES) for number in range(DEVICES)]
        names = [ward.enroll(number, told) for number in range(DEVICES)]
        running = [stack.enter_context(ExitStack()) for _ in names]
        processes = [
            held.enter_context(ward.running(number, data[number]))
            for number, held in enumerate(running)
        ]

        def kill_device(victim: int) -> None:
            processes[victim].kill()
            processes[victim].wait()
            running[victim].close()
            processes[victim] = running[victim].enter_context(ward.running(victim, data[victim]))

        job = job_of(tiny_job, "central")
        ward.submit(job, "central")
        folder = JobFolder(ward.folder / "jobs" / "central")
        assert soon(lambda: at_work(folder, names[0]), 300, 0.02), ward.logs()
        kill_device(0)
        updates = check_what_was_spent(ward, job, "central")
        assert updates in ([DEVICES - 1, DEVICES], [DEVICES, DEVICES])

        job = job_of(tiny_job, "sums")
        ward.submit(job, "sums")
        assert soon(lambda: ward.sum_stage(1, job.hash()) == "Masked", 300, 0.02), ward.logs()
        kill_device(1)
        updates = check_what_was_spent(ward, job, "sums")
        assert updates in ([DEVICES - 1, DEVICES], [DEVICES, DEVICES])

        job = job_of(tiny_job, "votes")
        ward.submit(job, "votes")
        assert soon(lambda: ward.sum_stage(2, job.hash()) == "Masked", 300, 0.02), ward.logs()
        (player,) = ward.pids_of("coordinator.jobs.process")
        os.kill(player, signal.SIGKILL)
        # Nobody had opened anything: the round is summed again, by all and with fresh keys.
        assert check_what_was_spent(ward, job, "votes") == [DEVICES, DEVICES]
        assert ward.job("votes")["starts"] == 2

        job = job_of(tiny_job, "poisson")
        ward.submit(job, "poisson")
        assert max(check_what_was_spent(ward, job, "poisson")) <= DEVICES

        job = job_of(tiny_job, "shares")
        ward.submit(job, "shares")
        assert soon(lambda: ward.sum_stage(1, job.hash()) == "Masked", 300, 0.02), ward.logs()
        kill_device(1)
        updates = check_what_was_spent(ward, job, "shares")
        assert updates in ([DEVICES - 1, DEVICES], [DEVICES, DEVICES])

        job = job_of(tiny_job, "local")
        ward.submit(job, "local")
        assert check_what_was_spent(ward, job, "local") == [DEVICES, DEVICES]
