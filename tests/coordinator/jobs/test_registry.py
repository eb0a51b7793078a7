# SPDX-License-Identifier: Apache-2.0
"""What the operator wants of jobs, and what became of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.enrolment.audit import Audit
from coordinator.enrolment.store import Store
from coordinator.errors import DeploymentError
from coordinator.jobs.registry import Jobs, Outcome

ONE, TWO = "ab" * 32, "cd" * 32


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "registry.sqlite") as opened:
        yield opened


@pytest.fixture
def jobs(store: Store) -> Jobs:
    times = iter(range(1, 1_000))
    return Jobs(store, Audit(store), now=lambda: float(next(times)))


def events(store: Store) -> list[tuple[str, str]]:
    return [(entry.event, entry.subject) for entry in Audit(store).entries()]


def test_a_job_is_due_until_it_is_stopped_or_has_ended(jobs: Jobs, store: Store) -> None:
    jobs.add("one", ONE)
    jobs.add("two", TWO)
    assert [entry.name for entry in jobs.all() if entry.due] == ["one", "two"]
    assert jobs.stop("one") and not jobs.stop("one")
    assert [entry.name for entry in jobs.all() if entry.due] == ["two"]
    assert jobs.resume("one") and not jobs.resume("one")
    jobs.started("one")
    jobs.end("one", Outcome.FINISHED)
    jobs.end("one", Outcome.FAILED, "too late")
    found = jobs.named("one")
    assert (found.outcome, found.reason, found.starts) == (Outcome.FINISHED, "", 1)
    assert found.ended is not None and found.ended > found.submitted
    assert events(store) == [
        ("submitted", "one"), ("submitted", "two"), ("stopped", "one"), ("resumed", "one"),
        ("finished", "one"),
    ]  # fmt: skip


def test_a_failed_job_may_be_gone_on_with_and_a_finished_one_not(jobs: Jobs) -> None:
    jobs.add("one", ONE)
    jobs.end("one", Outcome.FAILED, "no\x1b[2J way")
    assert "\x1b" not in jobs.named("one").reason
    with pytest.raises(DeploymentError, match="has failed already"):
        jobs.stop("one")
    assert jobs.resume("one")
    found = jobs.named("one")
    assert found.due and not found.reason and found.ended is None
    jobs.end("one", Outcome.FINISHED)
    with pytest.raises(DeploymentError, match="is finished; change its seed"):
        jobs.resume("one")


def test_names_and_jobs_are_there_once(jobs: Jobs, store: Store) -> None:
    jobs.add("one", ONE)
    with pytest.raises(DeploymentError, match="was submitted before, as one"):
        jobs.add("other", ONE)
    with pytest.raises(DeploymentError, match="choose another --name"):
        jobs.add("one", TWO)
    with pytest.raises(DeploymentError, match="expected one of one, found 'none'"):
        jobs.named("none")
    assert jobs.by_hash(TWO) is None and jobs.by_name("other") is None
    assert events(store) == [("submitted", "one")]
