# SPDX-License-Identifier: Apache-2.0
"""Plays one job of a deployment: its rounds, over whatever link, and then its results."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Protocol

from aggregation.errors import MergeError, PrivacyError
from coordinator.deployment import Deployment
from coordinator.errors import (
    DeploymentError,
    JobError,
    JobStoppedError,
    JournalConflictError,
    JournalFormatError,
)
from coordinator.job import Job, load_job
from coordinator.jobs.folder import JobFolder, JobState
from coordinator.jobs.outstanding import ExpectingLink, Outstanding
from coordinator.jobs.registry import JobEntry, Outcome
from coordinator.jobs.results import write_results
from coordinator.jobs.tester import open_tester
from coordinator.journal import Journal
from coordinator.link import Link
from coordinator.reports import RoundReport
from coordinator.rounds import run_rounds
from edge_runtime import preprocess
from edge_runtime.bundle import open_bundle
from edge_runtime.errors import EdgeError
from protocol.errors import ProtocolError
from protocol.signing import public_key_hex
from protocol.tensors import Tensors
from reports.units import privacy_words
from tuning.errors import TuningError

if TYPE_CHECKING:
    from coordinator.enrolment.devices import Devices

_PATIENCE_S: Final = 5.0  # somebody may be looking whether the job is played
_REJOIN_S: Final = 120.0  # SuperNodes find a restarted SuperLink within seconds
_LOOK_S: Final = 0.5  # between two looks at what the operator wants

# Another start would find the same.
_HOPELESS: Final = (
    DeploymentError,
    EdgeError,
    JobError,
    JournalConflictError,
    JournalFormatError,
    MergeError,
    PrivacyError,
    ProtocolError,
    TuningError,
)

_log = logging.getLogger(__name__)


class OpenLink(Protocol):
    """Makes the link to a deployment's devices."""

    def __call__(
        self, job: Job, names: Callable[[], Mapping[int, str]], tick: Callable[[], None]
    ) -> Link:
        """
        Args:
            names: the devices that are members now, by Flower's numbers.
            tick: called while waiting; what it raises ends the waiting.
        """
        ...


def play_job(deployment: Deployment, name: str, open_link: OpenLink) -> None:
    """Play a job from where its journal stands to its end, or until the operator stops it.

    Nothing happens where another process plays it, or nobody wants it. What another start cannot
    mend ends the job as failed; anything else is raised, and the job is begun again by the service.
    """
    folder = JobFolder(deployment.jobs_folder / name)
    entry = deployment.jobs.named(name)
    with folder.playing(patience_s=_PATIENCE_S) as mine:
        if not mine or not entry.due:
            _log.info("job %s: played by another process, or not wanted", name)
            return
        deployment.jobs.started(name)
        watch = _Watch(folder, deployment, name)
        try:
            _play(deployment, folder, entry, open_link, watch)
        except JobStoppedError:
            watch.say(doing="stopped")
        except _HOPELESS as error:
            _log.exception("job %s failed", name)
            deployment.jobs.end(name, Outcome.FAILED, str(error))
            watch.say(doing="failed", why=str(error))
        except Exception as error:
            watch.say(doing="waiting", why=f"{type(error).__name__}: {error}; it is begun again")
            raise


def _play(
    deployment: Deployment,
    folder: JobFolder,
    entry: JobEntry,
    open_link: OpenLink,
    watch: _Watch,
) -> None:
    job = load_job(folder.job)
    with Journal(folder.journal) as journal:
        watch.plays(job, journal.reports(entry.hash))
    bundle = open_bundle(folder.bundle, public_key=public_key_hex(deployment.signing_key))
    tester = open_tester(folder, bundle)
    first = bundle.initial()
    preprocessing = bundle.manifest.preprocessing
    test, validation = (
        preprocess(preprocessing, own) if (own := folder.samples(which)) else {}
        for which in ("test", "validation")
    )

    def evaluate(tensors: Tensors, offset: Tensors) -> Mapping[str, float]:
        watch.tick()
        return tester.evaluate({**first, **tensors}, test, offset=offset) if test else {}

    def choose_by(tensors: Tensors) -> float:
        return tester.evaluate({**first, **tensors}, validation)["accuracy"]

    devices = deployment.enrolment.devices
    with ExitStack() as stack:
        journal = stack.enter_context(Journal(folder.journal, keep_answers=True))
        link = open_link(job, devices.members_by_node, watch.tick)
        streamed = _nothing_streamed
        if job.is_split:
            outstanding = stack.enter_context(Outstanding(folder.outstanding))
            link, streamed = ExpectingLink(link, outstanding), outstanding.streamed

        def on_round(report: RoundReport) -> None:
            _count(devices, journal.contributors(entry.hash, report.round))
            watch.done(report)

        spec = bundle.manifest.shared
        result = run_rounds(
            job,
            spec,
            {name: first[name] for name in spec.names},
            link,
            journal,
            on_round,
            evaluate,
            streamed=streamed,
            pairs=bundle.manifest.pairs,
            choose_by=choose_by if validation else None,
            watch=watch,
            rejoin_s=_REJOIN_S,
            pause=watch.pause,
            credentials=devices.certificates,
        )
        # A private job may end before its rounds are over.
        watch.say(doing="finishing", round=len(journal.reports(entry.hash)))
        tensors = {**first, **result.tensors}
        key = deployment.signing_key
        write_results(folder, entry, job, bundle, journal, tensors, result.offset, key)
    deployment.jobs.end(entry.name, Outcome.FINISHED)
    watch.say(doing="finished")


def _nothing_streamed() -> tuple[int, int]:
    return 0, 0


def _count(devices: Devices, contributors: Sequence[str]) -> None:
    for name in contributors:
        devices.note(name, rounds=1)
    devices.flush()


class _Watch:
    """What the round engine tells while it waits, written where `status` reads it."""

    def __init__(self, folder: JobFolder, deployment: Deployment, name: str) -> None:
        self._folder = folder
        self._jobs = deployment.jobs
        self._name = name
        self._state = JobState()
        self._asynchronous = False
        self._looked = 0.0

    def plays(self, job: Job, reports: Sequence[Mapping[str, Any]]) -> None:
        """What is played is known now, and which rounds of it have been: what these have spent
        stays spent."""
        self._asynchronous = job.rounds.mode == "async"
        privacy = reports[-1]["privacy"] if reports else {}
        self.say(doing="starting", rounds=job.rounds.count, privacy=privacy)

    def say(self, **changes: Any) -> None:
        """Change what `status` shows; why, unless it is told anew, holds no more."""
        new = replace(self._state, **{"why": "", **changes})
        if new != self._state:
            self._state = new
            self._folder.say(replace(new, since=time.time()))

    def tick(self) -> None:
        """Raises: JobStoppedError once the operator wants the job no more."""
        now = time.monotonic()
        if now - self._looked >= _LOOK_S:
            self._looked = now
            if not self._jobs.named(self._name).wanted:
                raise JobStoppedError(f"job {self._name} was stopped")

    def pause(self, seconds: float) -> None:
        """Sleep, and look meanwhile what the operator wants."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.tick()
            time.sleep(min(left, _LOOK_S))

    def waits(self, round: int, have: int, need: int, why: Mapping[str, str]) -> None:
        """See `coordinator.watch.Watch`."""
        _log.info("round %d waits: %d of %d devices can take part; %s", round, have, need, why)
        self.say(
            doing="waiting",
            round=round,
            asked=(),
            answered=(),
            not_asked=dict(why),
            why=f"{have} of {need} devices that round {round} needs can take part",
        )

    def asked(self, round: int, clients: Sequence[str]) -> None:
        """See `coordinator.watch.Watch`."""
        _log.info("round %d: asked %s", round, ", ".join(clients))
        # Of an asynchronous job each is asked by itself, while the others are at work.
        at_work = [one for one in self._state.asked if one not in self._state.answered]
        before = at_work if self._asynchronous and self._state.doing == "training" else []
        asked = tuple(dict.fromkeys([*before, *clients]))
        self.say(doing="training", round=round, asked=asked, answered=(), not_asked={})

    def answered(self, round: int, client: str, have: int) -> None:
        """See `coordinator.watch.Watch`."""
        _log.info("round %d: %s has answered, the %d. to do so", round, client, have)
        self.say(answered=(*self._state.answered, client))
        self.tick()

    def done(self, report: RoundReport) -> None:
        """A round was committed."""
        for rejection in report.rejections:
            _log.warning("%s", rejection)
        _log.info(
            "round %d: %d updates of %d samples in %.1f s%s", report.round, report.updates,
            report.samples, report.seconds, f"; {report.note}" if report.note else "",
        )  # fmt: skip
        if spent := privacy_words(report.privacy):
            _log.info("round %d: %s", report.round, spent)
        if self._asynchronous:
            self.say(round=report.round)
        else:
            privacy = report.privacy
            self.say(doing="asking", round=report.round, asked=(), answered=(), privacy=privacy)
        self.tick()
