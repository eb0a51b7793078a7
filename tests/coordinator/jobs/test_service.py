# SPDX-License-Identifier: Apache-2.0
"""Jobs that should be playing are begun, one at a time, and again when their player is gone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from coordinator.deployment import Deployment, Settings
from coordinator.errors import SuperLinkError
from coordinator.jobs import service
from coordinator.jobs.folder import JobFolder
from coordinator.jobs.registry import Outcome
from coordinator.jobs.service import JobService


class Starter:
    """Begins a job by taking its lock; fails so often before."""

    def __init__(self, deployment: Deployment, failures: int = 0) -> None:
        self._deployment = deployment
        self.failures = failures
        self.begun: list[str] = []
        self.held = ExitStack()

    def __call__(self, name: str) -> None:
        if self.failures:
            self.failures -= 1
            raise SuperLinkError("it is not up")
        self.begun.append(name)
        folder = JobFolder(self._deployment.jobs_folder / name)
        assert self.held.enter_context(folder.playing())

    def dies(self) -> None:
        self.held.close()


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    settings = Settings(name="ward", addresses=("localhost",))
    with Deployment.create(tmp_path / "deployment", settings) as made:
        for number, name in enumerate(("one", "two")):
            (made.jobs_folder / name).mkdir(parents=True)
            made.jobs.add(name, f"{number:064x}")
        yield made


def test_one_job_after_another(deployment: Deployment) -> None:
    clock, starter = Clock(), Starter(deployment)
    looking = JobService(deployment, starter, clock=clock)
    for _ in range(3):
        looking.look()
        clock.now += 100
    assert starter.begun == ["one"], "it is played, and the other waits"
    deployment.jobs.end("one", Outcome.FINISHED)
    starter.dies()
    looking.look()
    assert starter.begun == ["one", "two"]
    deployment.jobs.stop("two")
    starter.dies()
    clock.now += 100
    looking.look()
    assert starter.begun == ["one", "two"]


def test_a_job_whose_player_died_is_begun_again_after_growing_pauses(
    deployment: Deployment,
) -> None:
    clock, starter = Clock(), Starter(deployment)
    looking = JobService(deployment, starter, clock=clock)
    waited = []
    for _ in range(4):
        begun, at = len(starter.begun), clock.now
        while len(starter.begun) == begun:
            looking.look()
            clock.now += 0.25
        waited.append(clock.now - at)
        starter.dies()
    assert waited == sorted(waited) and waited[-1] > 2 * waited[1]
    folder = JobFolder(deployment.jobs_folder / "one")
    clock.now += 100
    folder.say(service.replace(folder.state(), round=3))  # it got on
    looking.look()
    starter.dies()
    clock.now += 1.0
    begun = len(starter.begun)
    looking.look()
    assert len(starter.begun) == begun + 1, "the first pause again"


def test_superlink_that_is_not_up_is_said_and_asked_again(deployment: Deployment) -> None:
    clock, starter = Clock(), Starter(deployment, failures=2)
    looking = JobService(deployment, starter, clock=clock)
    looking.look()
    state = JobFolder(deployment.jobs_folder / "one").state()
    assert (state.doing, starter.begun) == ("waiting", [])
    assert "cannot be begun yet: it is not up" in state.why
    for _ in range(2):
        clock.now += 100
        looking.look()
    assert starter.begun == ["one"]
    starter.dies()
