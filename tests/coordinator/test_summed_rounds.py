# SPDX-License-Identifier: Apache-2.0
"""Rounds of secure sums, private ones among them, whose coordinator dies: what was opened is not
lost, and what was not is summed again by those who have opened nothing."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from aggregation.codecs.common_grid import CommonGrid
from aggregation.secure_aggregation.messages import Consent, Reveal, decode
from coordinator.job import Job
from coordinator.journal import Journal
from coordinator.link import Failure
from coordinator.merging import Step
from coordinator.privacy_section import PrivacySection
from coordinator.reports import RoundReport
from coordinator.rounds import run_rounds
from coordinator.sections import AggregationSection, DataSection, RoundsSection, UpdateSection
from protocol.plan import unpack_plan
from protocol.rejection import RejectionCode
from protocol.summing import SUM_MAGIC, unpack_sum_request
from protocol.tensors import ParamSpec, Tensors
from protocol.update import UPDATE_MAGIC

CLIENTS = ("ada", "ben", "cyd", "dan", "eve")
ROUNDS = 3
MakeLink = Callable[..., Any]
MODES: dict[str, dict[str, Any]] = {
    "none": {},
    "central": {"mode": "central", "noise_multiplier": 0.5, "clip": 1.2, "sampling": "all"},
}


@pytest.fixture(autouse=True)
def no_power_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process wrote that is gone is with the kernel, flushed or not."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class CrashError(Exception):
    """The process ends here."""


def job_of(mode: str = "none") -> Job:
    return Job(
        data=DataSection(clients=5, held_out=0.0),
        update=UpdateSection(codec="grid:8,1.0", metrics=""),
        aggregation=AggregationSection(weighting="uniform"),
        rounds=RoundsSection(count=ROUNDS, evaluate_every=ROUNDS),
        privacy=PrivacySection(secure_aggregation=True, delta=1e-3, corrupt=0.0, **MODES[mode]),
    )


def seeded(number: int) -> bytes:
    return bytes([number]) * 32


def play(
    job: Job, link: Any, initial: Tensors, path: Path
) -> tuple[dict[str, bytes], list[RoundReport]]:
    reports: list[RoundReport] = []
    with Journal(path, keep_tensors=0, keep_answers=True) as journal:
        result = run_rounds(
            job, ParamSpec.of(initial), initial, link, journal, reports.append,
            lambda tensors, offset: {}, seeds=seeded, credentials=link.credentials,
        )  # fmt: skip
    return {name: value.tobytes() for name, value in result.tensors.items()}, reports


def facts(report: RoundReport) -> dict[str, Any]:
    """What depends neither on the clock nor on how long signatures happen to be."""
    told = report.to_json()
    chance = ("seconds", "fit_seconds", "uplink_bytes", "downlink_bytes")
    return {name: value for name, value in told.items() if name not in chance}


def round_of(blob: bytes) -> int:
    """Of a plan, or of a message of a sum."""
    if blob.startswith(SUM_MAGIC):
        return unpack_sum_request(blob).round
    return unpack_plan(blob, max_bytes=10**6)[0].round


@contextmanager
def crash_in_round(number: int, owner: Any, name: str) -> Iterator[None]:
    """The call ends the run when it is made for the first time in a round."""
    inner, playing = getattr(owner, name), [0]
    begin = Journal.begin_round

    def begin_round(self: Journal, job: str, round: int, *rest: Any, **options: Any) -> Any:
        playing[0] = round
        return begin(self, job, round, *rest, **options)

    def call(*args: Any, **options: Any) -> Any:
        if playing[0] == number:
            raise CrashError
        return inner(*args, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(CrashError):
        patch.setattr(Journal, "begin_round", begin_round)
        patch.setattr(owner, name, call)
        yield


def instead(client: str, kind: type, does: Callable[[], Any]) -> Callable[[str, bytes], Any]:
    """A client whose answer of that kind, though it is sent, does not arrive."""

    def meddle(name: str, blob: bytes) -> Any:
        of_sum = name == client and not blob.startswith(UPDATE_MAGIC)
        return does() if of_sum and isinstance(decode(blob, max_bytes=10**6), kind) else blob

    return meddle


def gone() -> Failure:
    return Failure(code=RejectionCode.NO_REPLY, reason="gone")


def crash() -> None:
    raise CrashError


@pytest.mark.parametrize(
    ("owner", "name", "mode"),
    [
        (Step, "finish", "none"),
        (CommonGrid, "mean", "central"),
        (Journal, "commit_round", "central"),
    ],
)
def test_a_sum_that_was_opened_is_gone_on_with_after_a_crash(
    owner: Any,
    name: str,
    mode: str,
    make_summing_link: MakeLink,
    initial: Tensors,
    tmp_path: Path,
) -> None:
    job, lost = job_of(mode), instead("dan", Consent, gone)

    def link_of(folder: str) -> Any:
        return make_summing_link(job, CLIENTS, memory=tmp_path / folder, meddle=lost)

    whole, undisturbed = play(job, link_of("whole"), initial, tmp_path / "whole.sqlite")
    path = tmp_path / "journal.sqlite"
    with crash_in_round(2, owner, name):
        play(job, link_of("devices"), initial, path)
    with Journal(path) as journal:
        assert journal.keeps_sum(job.hash(), 2)
        opened = journal.opened_sum(job.hash(), 2)
    assert opened is not None and list(opened.members) == list(CLIENTS)

    link = link_of("devices")
    final, reports = play(job, link, initial, path)
    assert final == whole
    assert {round_of(message.blob) for message in link.asked} == {3}, "nobody is asked again"
    assert [facts(report) for report in reports] == [facts(report) for report in undisturbed[1:]]
    assert [rejection.client for rejection in reports[0].rejections] == ["dan"]
    first = reports[0]
    told = (opened.uplink_bytes, opened.downlink_bytes)
    assert (first.uplink_bytes, first.downlink_bytes) == told and min(told) > 0
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT count(*) FROM sums").fetchone() == (0,)
    with Journal(path) as journal:
        charged = [charge.round for charge in journal.charges(job.hash())]
    assert charged == ([1, 2, 3] if mode == "central" else [])


def test_a_sum_that_nobody_had_opened_is_asked_for_again(
    make_summing_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    """With fresh keys: it is the same sum."""
    job = job_of("central")

    def link_of(folder: str, meddle: Any = lambda client, blob: blob) -> Any:
        return make_summing_link(job, CLIENTS, memory=tmp_path / folder, meddle=meddle)

    whole, _ = play(job, link_of("whole"), initial, tmp_path / "whole.sqlite")
    path = tmp_path / "journal.sqlite"
    with pytest.raises(CrashError):
        play(job, link_of("devices", instead("eve", Consent, crash)), initial, path)
    with Journal(path) as journal:
        assert not journal.keeps_sum(job.hash(), 1)
    final, reports = play(job, link_of("devices"), initial, path)
    assert final == whole
    assert [(report.updates, report.rejections) for report in reports] == [(5, ())] * ROUNDS


@pytest.mark.parametrize("mode", MODES)
def test_clients_that_opened_a_sum_which_was_lost_take_no_part_in_another(
    mode: str, make_summing_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    """In the first round one had, and the others make a sum without it; in the second all had."""
    job, path = job_of(mode), tmp_path / "journal.sqlite"

    def link_of(meddle: Any = lambda client, blob: blob) -> Any:
        return make_summing_link(job, CLIENTS, memory=tmp_path / "devices", meddle=meddle)

    with pytest.raises(CrashError):
        play(job, link_of(instead("ada", Reveal, crash)), initial, path)
    with crash_in_round(2, Journal, "keep_sum"):
        play(job, link_of(), initial, path)
    _, reports = play(job, link_of(), initial, path)
    with Journal(path) as journal:
        first = RoundReport.from_json(journal.reports(job.hash())[0])
        charged = [charge.round for charge in journal.charges(job.hash())]
    assert first.updates == 4 and [one.client for one in first.rejections] == ["ada"]
    assert "was opened already" in first.rejections[0].reason
    assert [report.updates for report in reports] == [0, 5]
    assert "no secure sum: too-few-survivors" in reports[0].note
    assert {one.client for one in reports[0].rejections} == set(CLIENTS)
    assert charged == ([1, 2, 3] if mode == "central" else [])
