# SPDX-License-Identifier: Apache-2.0
"""What SuperLink starts for a job: the installed player, whatever app is named.

Whoever reaches SuperLink's port may submit an app of any code, and every user of this machine
reaches it. Ours is never loaded from what was submitted: SuperLink finds `flwr-serverapp` by PATH,
where this module stands, and all that a submitted app can say is the name of a job.
"""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from coordinator.deployment import Deployment
from coordinator.flower_link import FlowerLink
from coordinator.jobs.folder import JobFolder
from coordinator.jobs.player import play_job
from coordinator.jobs.program import FOLDER_VARIABLE
from coordinator.superlink import JOB_KEY

if TYPE_CHECKING:
    from flwr.app import Context
    from flwr.serverapp import Grid

    from coordinator.job import Job

# What Flower's runner calls with the app that it would load.
_RUN: Final = "run_"
_SURVEY_S: Final = 120.0  # a device fetches the job's bundle first
_POLL_S: Final = 0.25
_LOG_BYTES: Final = 4 << 20

Play = Callable[["Grid", "Context"], None]


def pin(runner: ModuleType, play: Play) -> None:
    """Takes the loading of apps out of a runner of Flower's. Raises: RuntimeError."""
    if not callable(getattr(runner, _RUN, None)):
        raise RuntimeError(
            f"expected {_RUN} in {runner.__name__}: this version of Flower starts server apps in "
            "another way; install flwr>=1.41,<1.43"
        )

    def run(*, grid: Grid, context: Context, **_: Any) -> Context:
        play(grid, context)
        return context

    setattr(runner, _RUN, run)


def play_named(folder: Path, grid: Grid, context: Context) -> None:
    """Play the job that a run's configuration names. Raises: as `play_job`."""
    name = str(context.run_config.get(JOB_KEY, ""))
    with Deployment(folder) as deployment:
        job_folder = JobFolder(deployment.jobs_folder / deployment.jobs.named(name).name)
        with _logging_to(job_folder.log):
            play_job(deployment, name, partial(_link, grid, deployment))


def main() -> None:
    """Flower's own process, with our player in the place of what was submitted."""
    from flwr.superlink.cli.flwr_serverapp import flwr_serverapp
    from flwr.superlink.runtime import run_serverapp as runner_of_package

    runner = sys.modules[runner_of_package.__module__]
    pin(runner, partial(play_named, Path(os.environ[FOLDER_VARIABLE])))
    flwr_serverapp()


def _link(
    grid: Grid,
    deployment: Deployment,
    job: Job,
    names: Callable[[], Mapping[int, str]],
    tick: Callable[[], None],
) -> FlowerLink:
    return FlowerLink(
        grid,
        names=names,
        tick=tick,
        timeout_s=job.rounds.timeout_s,
        survey_timeout_s=_SURVEY_S,
        split_port=deployment.settings.split_port if job.is_split else 0,
        poll_s=_POLL_S,
    )


@contextlib.contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """The job's log, beside what Flower's process prints."""
    handler = logging.handlers.RotatingFileHandler(
        path, maxBytes=_LOG_BYTES, backupCount=2, encoding="utf-8"
    )
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("coordinator")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


if __name__ == "__main__":
    main()
