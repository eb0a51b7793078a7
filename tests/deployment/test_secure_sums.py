# SPDX-License-Identifier: Apache-2.0
"""Secure sums over a real deployment, of which a device is killed in mid-protocol. `make chaos`
runs it; in the suite tests/client_sdk/test_summing.py answers the same messages from devices'
folders."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest

DEVICES, SAMPLES, ROUNDS = 4, 40, 2
JOBS: dict[str, dict[str, Any]] = {
    "ssf": {},
    "fedins": {"settings": {"elements": 4, "selected": 2}},
    "lora": {"factors": "up"},
    "one-bit-adapter": {"codec": "votes:0.2", "error_feedback": True},
}


def job_of(tiny_job: Any, method: str) -> Any:
    from coordinator.privacy_section import PrivacySection
    from coordinator.sections import AggregationSection, UpdateSection

    options = JOBS[method]
    job = tiny_job(
        method,
        settings=options.get("settings", {}),
        update=UpdateSection(
            codec=options.get("codec", "grid:8,1.0"),
            error_feedback=options.get("error_feedback", False),
        ),
        aggregation=AggregationSection(weighting="uniform", factors=options.get("factors", "both")),
        privacy=PrivacySection(secure_aggregation=True),
    )
    return replace(job, rounds=replace(job.rounds, count=ROUNDS, min_clients=DEVICES))


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_a_device_is_killed_in_the_midst_of_a_sum(ward: Any, digits: Any, tiny_job: Any) -> None:
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
        for victim, method in enumerate(JOBS):
            job = job_of(tiny_job, method)
            ward.submit(job, method)
            # It has masked its vector: it may be in the sum or not, and cannot help to open it.
            last = time.monotonic() + 300
            while ward.sum_stage(victim, job.hash()) != "Masked":
                assert time.monotonic() < last, ward.logs()
                time.sleep(0.05)
            processes[victim].kill()
            processes[victim].wait()
            running[victim].close()
            processes[victim] = running[victim].enter_context(ward.running(victim, data[victim]))
            folder = ward.finish(method, seconds=600)
            with contextlib.closing(sqlite3.connect(folder / "journal.sqlite")) as db:
                counted = db.execute("SELECT round, client FROM updates").fetchall()
                answers = db.execute(
                    "SELECT round, client, reason FROM rejections ORDER BY 1"
                ).fetchall()
            summary = json.loads((folder / "summary.json").read_text())
            by_round = [sum(number == one for one, _ in counted) for number in (1, 2)]
            print(f"{method}: {by_round} of {DEVICES} updates, {answers}")
            assert min(by_round) >= DEVICES - 1 and by_round[1] == DEVICES, answers
            assert len(counted) == len(set(counted)) and summary["rounds"] == ROUNDS
            told_by = {client for _, client, _ in answers}
            assert told_by <= {names[victim]}
