# SPDX-License-Identifier: Apache-2.0
"""Rounds as deployments play them: over a survey, with answers kept, and again after a crash."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.errors import NoClientsError
from coordinator.gathering import pauses
from coordinator.job import Job
from coordinator.journal import Journal
from coordinator.link import Failure, Outgoing, never
from coordinator.reports import RoundReport
from coordinator.rounds import Result, run_rounds
from coordinator.sections import (
    AggregationSection,
    DataSection,
    MethodSpec,
    RoundsSection,
    TrainingSection,
    UpdateSection,
)
from protocol.factors import FactorPair
from protocol.plan import unpack_plan
from protocol.readiness import Readiness
from protocol.rejection import RejectionCode
from protocol.tensors import ParamSpec, Tensors

CLIENTS = ("ada", "ben", "cyd", "dan", "eve")
JOB = Job(
    data=DataSection(clients=5, held_out=0.0), rounds=RoundsSection(count=3, evaluate_every=3)
)
FEEDBACK = UpdateSection(codec="one-bit", error_feedback=True)
MakeLink = Callable[..., Any]


@dataclass
class Seen:
    """A watch that notes what it is told."""

    waited: list[tuple[int, int, int, dict[str, str]]] = field(default_factory=list)
    asked_: list[tuple[int, list[str]]] = field(default_factory=list)
    answered_: list[tuple[int, str, int]] = field(default_factory=list)

    def waits(self, round: int, have: int, need: int, why: Mapping[str, str]) -> None:
        self.waited.append((round, have, need, dict(why)))

    def asked(self, round: int, clients: Sequence[str]) -> None:
        self.asked_.append((round, list(clients)))

    def answered(self, round: int, client: str, have: int) -> None:
        self.answered_.append((round, client, have))


def play(
    job: Job, link: Any, initial: Tensors, path: Path, *, keep: bool = True, **options: Any
) -> tuple[Result, list[RoundReport]]:
    reports: list[RoundReport] = []
    with Journal(path, keep_answers=keep) as journal:
        on_round = options.pop("on_round", reports.append)
        result = run_rounds(
            job, ParamSpec.of(initial), initial, link, journal, on_round,
            lambda tensors, offset: {"loss": 0.0}, **options,
        )  # fmt: skip
        assert not journal.kept_answers(job.hash()), "no answer outlives its round"
    return result, reports


def same_bits(left: Result, right: Result) -> bool:
    return {n: v.tobytes() for n, v in left.tensors.items()} == {
        n: v.tobytes() for n, v in right.tensors.items()
    }


def fits(link: Any) -> list[Outgoing]:
    return [message for message in link.asked if message.kind == "fit"]


def strip(report: RoundReport) -> RoundReport:
    return replace(report, seconds=0.0, fit_seconds=0.0)


def test_kept_answers_give_the_bits_and_the_report_of_those_merged_as_they_come(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    job = replace(JOB, update=FEEDBACK)
    meddle = {"ben": b"nonsense", "cyd": bytes(10**5)}
    results, reports = [], []
    for name, keep in (("kept", True), ("streamed", False)):
        link = make_link(
            job,
            CLIENTS,
            memory=tmp_path / f"{name}-memory",
            meddle=lambda client, blob: meddle.get(client, blob),
            order=lambda clients: [*clients[::-1], "ada"],
        )
        result, found = play(job, link, initial, tmp_path / name, keep=keep)
        results.append(result)
        reports.append(found)
    assert same_bits(*results)
    for kept, streamed in zip(*reports, strict=True):
        by_client = [
            sorted((r.client, r.code) for r in report.rejections) for report in (kept, streamed)
        ]
        assert (
            by_client[0]
            == by_client[1]
            == [
                ("ada", RejectionCode.DUPLICATE),
                ("ben", RejectionCode.TRUNCATED),
                ("cyd", RejectionCode.TOO_LONG),
            ]
        )
        assert strip(replace(kept, rejections=())) == strip(replace(streamed, rejections=()))


PAIR = FactorPair(down="a", up="b", scale=1.0, base="frozen")
FACTORS = {
    "a": np.linspace(-1, 1, 24, dtype=np.float32).reshape(4, 6),
    "b": np.linspace(0, 1, 20, dtype=np.float32).reshape(5, 4),
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rounds": replace(JOB.rounds, clients_per_round=3)},
        {"update": FEEDBACK},
        {"update": replace(FEEDBACK, downlink="changes", downlink_codec="one-bit")},
        {"update": UpdateSection(downlink="changes", downlink_codec="random-k:0.3")},
        {"training": TrainingSection(scaffold=True),
         "aggregation": AggregationSection(weighting="uniform")},
        {"aggregation": AggregationSection(server_optimizer="adam", server_learning_rate=0.01)},
        {"aggregation": AggregationSection(merger="hetlora", ranks="2,4")},
        {"aggregation": AggregationSection(merger="rolora")},
    ],
    ids=["plain", "some", "feedback", "changes", "random", "scaffold", "adam", "ranks", "roles"],
)  # fmt: skip
def test_a_round_that_is_played_again_sends_the_same_bytes_to_the_same_clients(
    make_link: MakeLink, initial: Tensors, tmp_path: Path, changes: dict[str, Any]
) -> None:
    job = replace(JOB, **changes)
    low_rank = job.aggregation.merger in ("hetlora", "rolora")
    if low_rank:
        job = replace(job, method=MethodSpec(name="lora", settings={"rank": 4}))
    options: dict[str, Any] = {"pairs": (PAIR,)} if low_rank else {}
    tensors = FACTORS if low_rank else initial

    def link_of(clients: Sequence[str], **settings: Any) -> Any:
        fixed = {"initial": tensors, "memory": tmp_path / "memory", **options}
        return make_link(job, clients, **fixed, **settings)

    exchanges = itertools.count(1)

    def lose_the_second(clients: list[str]) -> list[str]:
        if next(exchanges) == 2:
            raise StoppedError
        return clients

    first = link_of(CLIENTS, order=lose_the_second)
    with pytest.raises(StoppedError):
        play(job, first, tensors, tmp_path / "j", **options)
    # Others have come meanwhile, and would be drawn if the choice were made again.
    again = link_of(("aaa", *CLIENTS, "zoe"))
    with pytest.raises(StoppedError):
        play(job, again, tensors, tmp_path / "j", on_round=stop, **options)
    lost = {m.client: m.blob for m in first.asked if plan_of(m).round == 2}
    assert {m.client: m.blob for m in again.asked} == lost
    assert len({plan_of(m).nonce for m in again.asked}) == len(lost) >= 3


def test_a_client_that_has_answered_is_not_asked_again(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    whole, reports = play(JOB, make_link(JOB, CLIENTS), initial, tmp_path / "whole")

    def break_at_dan(client: str, blob: bytes) -> bytes:
        if client == "dan" and len(link.asked) > 5:
            raise StoppedError
        return blob

    link = make_link(JOB, CLIENTS, meddle=break_at_dan)
    with pytest.raises(StoppedError):
        play(JOB, link, initial, tmp_path / "j")
    seen = Seen()
    again = make_link(JOB, CLIENTS)
    resumed, later = play(JOB, again, initial, tmp_path / "j", watch=seen)
    assert same_bits(whole, resumed)
    assert [(m.client, plan_of(m).round) for m in again.asked[:2]] == [("dan", 2), ("eve", 2)]
    assert seen.asked_[0] == (2, list(CLIENTS))
    assert seen.answered_[:2] == [(2, "dan", 4), (2, "eve", 5)]
    assert [report.updates for report in (*reports[:1], *later)] == [5, 5, 5]
    assert later[0].uplink_bytes == reports[1].uplink_bytes, "kept answers are counted, too"


def test_answers_of_other_attempts_other_rounds_and_other_clients_never_count_after_a_restart(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    job = replace(JOB, rounds=replace(JOB.rounds, count=2))
    whole, _ = play(job, make_link(job, CLIENTS), initial, tmp_path / "whole")
    old: dict[str, bytes] = {}

    def break_in_the_second(client: str, blob: bytes) -> bytes:
        if len(link.asked) == 5:
            old[client] = blob
        elif client == "cyd":
            raise StoppedError
        return blob

    link = make_link(job, CLIENTS, meddle=break_in_the_second)
    with pytest.raises(StoppedError):
        play(job, link, initial, tmp_path / "j")
    # Cyd answers for the round before, dan with what eve said; ada, who is not asked, and eve once
    # more.
    again = make_link(job, CLIENTS)

    def exchange(
        outgoing: Iterable[Outgoing], *, closed: Callable[[], bool] = never
    ) -> Generator[tuple[str, bytes | Failure]]:
        plans = {message.client: message.blob for message in outgoing}
        assert list(plans) == ["cyd", "dan", "eve"]
        of_eve = again._answer("eve", plans["eve"])
        yield from (("ada", b"late"), ("cyd", old["cyd"]), ("dan", of_eve))
        yield from (("eve", of_eve), ("eve", of_eve))

    again.exchange = exchange
    resumed, (report,) = play(job, again, initial, tmp_path / "j")
    codes = sorted((r.client, r.code) for r in report.rejections)
    assert codes == [
        ("ada", RejectionCode.DUPLICATE),
        ("cyd", RejectionCode.WRONG_ROUND),
        ("dan", RejectionCode.WRONG_CLIENT),
        ("eve", RejectionCode.DUPLICATE),
    ]
    assert report.updates == 3
    with Journal(tmp_path / "j") as journal:
        assert journal.contributors(job.hash(), 2) == ["ada", "ben", "eve"]
    assert not same_bits(whole, resumed)


@pytest.mark.parametrize("keep", [True, False])
def test_an_answer_of_a_device_that_was_revoked_meanwhile_is_left_out(
    make_link: MakeLink, initial: Tensors, tmp_path: Path, keep: bool
) -> None:
    job = replace(JOB, rounds=replace(JOB.rounds, count=1))

    def revoke(client: str, blob: bytes) -> bytes:
        if client == "dan":
            link.revoked = {"ben", "eve"}
        return blob

    link = make_link(job, CLIENTS, meddle=revoke)
    final, (report,) = play(job, link, initial, tmp_path / "j", keep=keep)
    # Where answers are kept until all are there, ben's is left out too, though it came in time.
    out = ["ben", "eve"] if keep else ["eve"]
    assert [(r.client, r.code) for r in report.rejections] == [
        (client, RejectionCode.REVOKED) for client in out
    ]
    few = make_link(job, CLIENTS, meddle=lambda c, blob: b"" if c in out else blob)
    expected, _ = play(job, few, initial, tmp_path / "few")
    assert same_bits(final, expected)


def test_a_round_waits_until_enough_clients_can_take_part_and_says_why(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    rounds = replace(JOB.rounds, count=1, min_clients=3, min_samples=10)
    job = replace(JOB, rounds=rounds)
    surveys = itertools.count()
    paused: list[float] = []

    def says(client: str) -> Readiness:
        at = next(surveys) // 5
        if client == "ada":
            return Readiness(samples=3)
        if client in ("ben", "cyd") or (client == "dan" and at >= 2):
            return Readiness(samples=20)
        return Readiness(ready=False, reason="runs on battery")

    seen = Seen()
    link = make_link(job, CLIENTS, says=says)
    _, (report,) = play(job, link, initial, tmp_path / "j", watch=seen, pause=paused.append)
    why = {
        "ada": "it has 3 samples, rounds.min_samples asks for 10",
        "dan": "runs on battery",
        "eve": "runs on battery",
    }
    assert seen.waited == [(1, 2, 3, why)] * 2
    assert seen.asked_ == [(1, ["ben", "cyd", "dan"])]
    assert [have for _, _, have in seen.answered_] == [1, 2, 3]
    assert report.clients == report.updates == 3
    assert len(paused) == 2
    with pytest.raises(NoClientsError, match=r"round 1: expected at least 3 clients, 2 can take"):
        play(job, make_link(job, CLIENTS, says=lambda c: says("ben") if c < "c" else says("eve")),
             initial, tmp_path / "k")  # fmt: skip


def test_pauses_grow_to_a_limit_and_are_never_in_step() -> None:
    first, second = (
        list(itertools.islice(pauses(np.random.default_rng(seed)), 40)) for seed in (1, 2)
    )
    assert first != second
    for found in (first, second):
        assert all(0.5 <= pause <= 60 for pause in found)
        assert max(found[:2]) < 2 and min(found[20:]) >= 30


def test_a_round_that_is_played_again_waits_for_its_own_clients_to_come_back(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    whole, _ = play(JOB, make_link(JOB, CLIENTS), initial, tmp_path / "whole")
    back_at = {"ada": 1.0, "ben": 0.0, "cyd": 0.0, "dan": 0.0, "eve": 10.0}
    for name, rejoin_s, revoked in (
        ("all", 60.0, set()),
        ("late", 3.0, set()),
        ("gone", 60.0, {"eve"}),
    ):
        path = tmp_path / name
        with pytest.raises(StoppedError):
            play(JOB, make_link(JOB, CLIENTS, order=stop), initial, path)
        now = [0.0]
        link = make_link(JOB, CLIENTS)
        link.says = lambda client, link=link, now=now: (
            Readiness() if now[0] >= back_at[client] else Readiness(ready=False, reason="away")
        )
        link.meddle = lambda client, blob, now=now: (
            blob
            if now[0] >= back_at[client]
            else Failure(code=RejectionCode.NO_REPLY, reason="away")
        )
        link.revoked = revoked
        seen = Seen()

        def pause(seconds: float, now: list[float] = now) -> None:
            now[0] += seconds

        result, reports = play(
            JOB, link, initial, path, watch=seen, rejoin_s=rejoin_s,
            clock=lambda now=now: now[0], pause=pause,
        )  # fmt: skip
        assert seen.waited[0][0] == 1 and "ada" in seen.waited[0][3]
        if name == "all":
            assert same_bits(result, whole) and seen.waited[-1][1:] == (4, 5, {"eve": "away"})
        elif name == "late":
            assert [r.client for r in reports[0].rejections] == ["eve"]
            assert 3.0 <= now[0] < 10
        else:
            assert now[0] < 3, "nobody waits for a device that was revoked"
            assert reports[0].rejections[0].client == "eve"


class StoppedError(Exception):
    """The coordinator is gone."""


@dataclass
class TimedLink:
    """Clients that take their time, by a clock that only this link moves: 0.01 s a look."""

    inner: Any
    seconds: Mapping[str, float]
    now: float = 0.0
    busy_until: dict[str, float] = field(default_factory=dict)

    def clock(self) -> float:
        return self.now

    def survey(self, job: str) -> Mapping[str, Readiness]:
        at_work = Readiness(ready=False, reason="still at work")
        return {
            name: at_work if self.busy_until.get(name, 0.0) > self.now else readiness
            for name, readiness in self.inner.survey(job).items()
        }

    def refused(self, client: str) -> Failure | None:
        return None

    def exchange(
        self, outgoing: Iterable[Outgoing | None], *, closed: Callable[[], bool] = never
    ) -> Generator[tuple[str, bytes | Failure]]:
        waiting = {message.client: message for message in outgoing if message is not None}
        for name in waiting:
            self.busy_until[name] = self.now + self.seconds[name]
        while waiting and not closed():
            for name in [name for name in waiting if self.busy_until[name] <= self.now]:
                yield name, self.inner._answer(name, waiting.pop(name).blob)
            self.now += 0.01


@pytest.mark.parametrize("by", ["over-selection", "deadline", "waiting"])
def test_slow_devices_hold_up_no_round(
    make_link: MakeLink, initial: Tensors, tmp_path: Path, by: str
) -> None:
    names = tuple(f"c{number}" for number in range(10))
    slow = dict.fromkeys(("c3", "c7"), 10.0)
    seconds = {name: 1.0 + 0.02 * place for place, name in enumerate(names)} | slow
    settings: dict[str, Any] = {
        "over-selection": {"clients_per_round": 8, "over_selection": 1.25, "min_clients": 6},
        "deadline": {"deadline_s": 1.4},
        "waiting": {},
    }[by]
    job = Job(
        data=DataSection(clients=10, held_out=0.0),
        rounds=RoundsSection(count=6, evaluate_every=6, **settings),
    )
    link = TimedLink(make_link(job, names), seconds)
    _, reports = play(job, link, initial, tmp_path / "j", clock=link.clock)
    median = sorted(seconds.values())[5]
    ratios = [report.fit_seconds / median for report in reports]
    if by == "waiting":
        assert min(ratios) > 5, "without either a round lasts as long as its slowest device"
        return
    assert max(ratios) <= 1.5
    assert all(report.updates == 8 for report in reports)
    late = [(r.client, r.code) for r in reports[0].rejections]
    assert late == [(client, RejectionCode.LATE) for client in slow]
    # They work on their first plan still, and are not asked until they are done with it.
    assert [report.clients for report in reports] == [10, 8, 8, 8, 8, 8]


def test_a_round_that_is_closed_in_time_says_so_and_leaves_tensors_when_updates_are_too_few(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    rounds = RoundsSection(count=1, deadline_s=2, min_updates=3)
    job = replace(JOB, rounds=rounds)
    seconds = {"ada": 9.0, "ben": 1.0, "cyd": 1.0, "dan": 9.0, "eve": 9.0}
    for keep in (True, False):
        link = TimedLink(make_link(job, CLIENTS), seconds)
        path = tmp_path / str(keep)
        result, (report,) = play(job, link, initial, path, clock=link.clock, keep=keep)
        assert all((result.tensors[name] == value).all() for name, value in initial.items())
        assert report.note.startswith("tensors unchanged: 2 valid updates")
        assert [(r.client, r.code) for r in report.rejections] == [
            (client, RejectionCode.LATE) for client in ("ada", "dan", "eve")
        ]
        reason = "the round was closed before, after rounds.deadline_s = 2"
        assert {r.reason for r in report.rejections} == {reason}
        assert report.fit_seconds == pytest.approx(2.0, abs=0.02)


def test_a_quorum_that_was_reached_before_a_crash_asks_nobody(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    job = replace(JOB, rounds=RoundsSection(count=1, quorum=2))

    def crash_in_merging(client: str) -> Failure | None:
        raise StoppedError

    orders: dict[str, Any] = {"order": lambda clients: clients[::-1]}
    whole, reports = play(job, make_link(job, CLIENTS, **orders), initial, tmp_path / "whole")
    broken = make_link(job, CLIENTS, **orders)
    broken.refused = crash_in_merging
    with pytest.raises(StoppedError):
        play(job, broken, initial, tmp_path / "j")
    again = make_link(job, CLIENTS, order=stop)
    result, (report,) = play(job, again, initial, tmp_path / "j")
    assert same_bits(whole, result) and not again.asked
    assert strip(report) == strip(replace(reports[0], downlink_bytes=0))


def stop(_: Any) -> Any:
    raise StoppedError


def plan_of(message: Outgoing) -> Any:
    return unpack_plan(message.blob, max_bytes=10**6)[0]
