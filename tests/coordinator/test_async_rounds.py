# SPDX-License-Identifier: Apache-2.0
"""Asynchronous rounds, on clients of differing speeds and a clock that only the link moves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregation.codecs import codec_named
from coordinator.errors import JobError
from coordinator.job import Job
from coordinator.journal import Journal
from coordinator.link import Failure, Outgoing, never
from coordinator.reports import RoundReport
from coordinator.rounds import Result, run_rounds
from coordinator.sections import (
    AggregationSection,
    DataSection,
    MethodSpec,
    PersonalSection,
    RoundsSection,
    SimulationSection,
    TrainingSection,
    UpdateSection,
)
from coordinator.watch import Unattended
from protocol.plan import unpack_plan
from protocol.readiness import Readiness
from protocol.rejection import RejectionCode
from protocol.tensors import ParamSpec, Tensors
from protocol.update import unpack_update

CLIENTS = tuple(f"c{number}" for number in range(10))
SLOW = ("c3", "c7")
SECONDS = {name: 10.0 if name in SLOW else 1.0 + 0.03 * place for place, name in enumerate(CLIENTS)}
ROUNDS = RoundsSection(mode="async", count=12, buffer=4, evaluate_every=12)
JOB = Job(data=DataSection(clients=10, held_out=0.0), rounds=ROUNDS)
MakeLink = Callable[..., Any]


@dataclass
class AsyncLink:
    """Clients that take their time; plans are taken one by one, as the round loop gives them."""

    inner: Any
    seconds: Mapping[str, float] = field(default_factory=lambda: SECONDS)
    now: float = 0.0
    log: list[tuple[str, bytes | None, bytes | Failure | None]] = field(default_factory=list)
    """(client, plan, None) when it is asked, (client, None, answer) when it has answered."""
    away: set[str] = field(default_factory=set)
    most: int = 0
    on_answer: Callable[[int], None] = lambda count: None

    def clock(self) -> float:
        return self.now

    def survey(self, job: str) -> Mapping[str, Readiness]:
        return {
            name: Readiness(ready=name not in self.away, reason="away") for name in self.seconds
        }

    def refused(self, client: str) -> Failure | None:
        return self.inner.refused(client)

    def exchange(
        self, outgoing: Iterable[Outgoing | None], *, closed: Callable[[], bool] = never
    ) -> Generator[tuple[str, bytes | Failure]]:
        source = iter(outgoing)
        waiting: dict[str, tuple[float, Outgoing]] = {}
        exhausted = False
        while True:
            while not exhausted and (message := next(source, "end")) is not None:
                if isinstance(message, str):
                    exhausted = True
                    break
                assert message.client not in waiting, "a client is asked for one round at a time"
                self.log.append((message.client, message.blob, None))
                waiting[message.client] = (self.now + self.seconds[message.client], message)
                self.most = max(self.most, len(waiting))
            if not waiting:
                return
            client = min(waiting, key=lambda name: (waiting[name][0], name))
            self.now, message = waiting.pop(client)
            answer = self.inner._answer(client, message.blob)
            self.log.append((client, None, answer))
            yield client, answer
            self.on_answer(len(self.log))


def play(
    job: Job, link: Any, initial: Tensors, path: Path, *, keep: bool = True, **options: Any
) -> tuple[Result, list[RoundReport]]:
    reports: list[RoundReport] = []
    with Journal(path, keep_answers=keep) as journal:
        result = run_rounds(
            job, ParamSpec.of(initial), initial, link, journal, reports.append,
            lambda tensors, offset: {"loss": 0.0}, clock=link.clock, **options,
        )  # fmt: skip
        assert not journal.kept_answers(job.hash())
    return result, reports


def oracle(
    job: Job, link: AsyncLink, initial: Tensors
) -> tuple[dict[str, np.ndarray], list[list[int]]]:
    """FedBuff word by word, over what came and when: the tensors, and each step's staleness."""
    rounds, uniform = job.rounds, job.aggregation.weighting == "uniform"
    tensors = {name: value.astype(np.float64) for name, value in initial.items()}
    started: dict[str, int] = {}
    buffer: list[tuple[float, dict[str, np.ndarray], int]] = []
    ages: list[list[int]] = []
    for client, plan, answer in link.log:
        if len(ages) == rounds.count:
            break
        if plan is not None:
            started[client] = len(ages)
            assert unpack_plan(plan, max_bytes=10**6)[0].round == len(ages) + 1
            continue
        assert isinstance(answer, bytes)
        header, payload = unpack_update(answer, max_bytes=10**6)
        age = len(ages) - started.pop(client)
        if rounds.max_staleness and age > rounds.max_staleness:
            continue
        weight = (1 if uniform else header.samples) * (1 + age) ** -rounds.staleness_exponent
        delta = codec_named("float32").decode(payload, ParamSpec.of(initial), 10**6)
        buffer.append((weight, delta, age))
        if len(buffer) == rounds.buffer:
            for name in tensors:
                total = sum(weight * delta[name].astype(np.float64) for weight, delta, _ in buffer)
                tensors[name] = tensors[name] + total / sum(weight for weight, _, _ in buffer)
            ages.append([age for _, _, age in buffer])
            buffer = []
    return tensors, ages


@pytest.mark.parametrize(
    ("changes", "weighting"),
    [
        ({}, "samples"),
        ({"staleness_exponent": 0.0}, "uniform"),
        ({"staleness_exponent": 1.0, "max_staleness": 1}, "samples"),
        ({"buffer": 1, "concurrency": 3}, "samples"),
        ({"buffer": 25}, "uniform"),
        ({"buffer": 2, "concurrency": 1}, "samples"),
        ({"buffer": 3, "concurrency": 3}, "uniform"),
    ],
)
@pytest.mark.parametrize("keep", [True, False])
def test_steps_are_those_of_the_algorithm(
    make_link: MakeLink,
    initial: Tensors,
    tmp_path: Path,
    changes: dict[str, Any],
    weighting: str,
    keep: bool,
) -> None:
    job = replace(
        JOB,
        rounds=replace(ROUNDS, **changes),
        aggregation=AggregationSection(weighting=weighting),
    )
    link = AsyncLink(make_link(job, CLIENTS))
    result, reports = play(job, link, initial, tmp_path / "j", keep=keep)
    tensors, ages = oracle(job, link, initial)
    for name, value in tensors.items():
        np.testing.assert_allclose(result.tensors[name], value, rtol=1e-5, atol=1e-6)
    assert [report.updates for report in reports] == [job.rounds.buffer] * job.rounds.count
    for report, of_step in zip(reports, ages, strict=True):
        assert report.staleness_mean == pytest.approx(sum(of_step) / len(of_step))
        assert report.staleness_max == max(of_step)
    assert f"the mean of its updates, each weighted by {weighting} x" in reports[0].note
    if job.rounds.concurrency:
        assert link.most == job.rounds.concurrency
    else:
        assert link.most == len(CLIENTS)
    if job.rounds.max_staleness:
        late = [r for report in reports for r in report.rejections]
        assert late and all(r.code == RejectionCode.LATE for r in late)
        assert "rounds.max_staleness allows 1" in late[0].reason
    oldest = max(age for step in ages for age in step)
    assert oldest == 0 if job.rounds.concurrency == 1 else oldest >= 1


def test_slow_devices_hold_up_no_step(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    job = replace(JOB, rounds=replace(ROUNDS, count=30, evaluate_every=30))
    link = AsyncLink(make_link(job, CLIENTS))
    _, reports = play(job, link, initial, tmp_path / "j")
    median = sorted(SECONDS.values())[5]
    assert max(report.fit_seconds for report in reports) <= 1.5 * median
    # Eight fast devices fill a buffer of four twice in the time of one of them.
    assert link.now <= 30 / 2 * 1.3 * median
    answered = Counter(client for client, plan, _ in link.log if plan is None)
    assert all(answered[client] >= 1 for client in SLOW), "what they learn is used as well"
    assert min(answered[client] for client in CLIENTS if client not in SLOW) >= 8


def test_a_client_that_is_asked_twice_from_the_same_tensors_trains_on_other_batches(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    job = replace(JOB, rounds=replace(ROUNDS, count=3, buffer=25, evaluate_every=3))
    link = AsyncLink(make_link(job, CLIENTS))
    play(job, link, initial, tmp_path / "j")
    plans = [unpack_plan(blob, max_bytes=10**6)[0] for _, blob, _ in link.log if blob]
    assert len(plans) > 75
    assert len({plan.nonce for plan in plans}) == len(plans)
    assert len({plan.seed for plan in plans}) == len(plans)


@pytest.mark.parametrize("keep", [True, False])
def test_clients_that_fail_are_asked_once_a_step_and_a_step_goes_on_with_what_there_is(
    make_link: MakeLink, initial: Tensors, tmp_path: Path, keep: bool
) -> None:
    job = replace(JOB, rounds=replace(ROUNDS, count=3, buffer=40, evaluate_every=3))

    def meddle(client: str, blob: bytes) -> bytes | Failure:
        if client == "c0":
            return blob
        if client == "c1":
            return b"nonsense"
        return Failure(code=RejectionCode.CLIENT_FAILED, reason="no data")

    answers = Counter[str]()

    def once(client: str, blob: bytes) -> bytes | Failure:
        answers[client] += 1
        good = answers[client] % 5
        return meddle(client, blob) if client != "c0" or good else b""

    link = AsyncLink(make_link(job, CLIENTS, meddle=once))
    _, reports = play(job, link, initial, tmp_path / "j", keep=keep)
    assert [report.updates for report in reports] == [4, 4, 4]
    assert {name: count for name, count in answers.items() if name != "c0"} == dict.fromkeys(
        CLIENTS[1:], 3
    )
    assert len(reports[0].rejections) == 10


def test_strays_revoked_devices_and_updates_too_few_change_nothing(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    job = replace(JOB, rounds=replace(ROUNDS, count=1, min_updates=3, evaluate_every=1))
    inner = make_link(job, CLIENTS)
    inner.revoked = {"c0", "c1", "c2"}
    link = AsyncLink(inner)
    result, (report,) = play(job, link, initial, tmp_path / "j")
    assert all(result.tensors[name].tobytes() == v.tobytes() for name, v in initial.items())
    codes = Counter(r.code for r in report.rejections)
    assert codes == {RejectionCode.REVOKED: 3}
    assert report.note.startswith("tensors unchanged: 1 valid updates")
    assert "9 clients were still at work at the end" in report.note

    class Doubled(AsyncLink):
        def exchange(self, outgoing: Any, *, closed: Any = never) -> Any:
            for client, answer in super().exchange(outgoing, closed=closed):
                yield client, answer
                yield client, answer

    link = Doubled(make_link(job, CLIENTS))
    _, (report,) = play(job, link, initial, tmp_path / "k")
    assert report.updates == 4
    assert {r.code for r in report.rejections} == {RejectionCode.DUPLICATE}


def test_whoever_comes_later_is_asked_from_the_next_step_on(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    def refuse(client: str, blob: bytes) -> bytes | Failure:
        reason = "runs on battery"
        failure = Failure(code=RejectionCode.CLIENT_FAILED, reason=reason)
        return failure if client in link.away else blob

    link = AsyncLink(make_link(JOB, CLIENTS, meddle=refuse), away={"c8", "c9"})

    def come(count: int) -> None:
        if count > 40:
            link.away = {"c0"}

    link.on_answer = come
    _, reports = play(JOB, link, initial, tmp_path / "j")
    asked = [client for client, plan, _ in link.log if plan]
    # Nobody hears of a device that is at work what keeps it from more, until it refuses that.
    assert [r.client for report in reports for r in report.rejections] == ["c0"]
    assert not {"c8", "c9"} & set(asked[:15]) and {"c8", "c9"} <= set(asked)
    assert "c0" in asked[:15] and "c0" not in asked[-15:]


def test_a_step_waits_when_all_have_gone(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    job = replace(JOB, rounds=replace(ROUNDS, count=3, buffer=1, concurrency=1, min_clients=4))
    link = AsyncLink(make_link(job, CLIENTS))
    waited: list[tuple[int, int, int]] = []

    class Looking(Unattended):
        def waits(self, round: int, have: int, need: int, why: Mapping[str, str]) -> None:
            waited.append((round, have, need))
            link.away = set(list(CLIENTS)[: len(link.away) - 3])

    survey = link.survey

    surveyed_after: set[int] = set()

    def leaving(job: str) -> Mapping[str, Readiness]:
        # After each answer everybody leaves before the survey, and they come back in time.
        if link.log and len(link.log) not in surveyed_after:
            surveyed_after.add(len(link.log))
            link.away = set(CLIENTS)
        return survey(job)

    link.survey = leaving  # type: ignore[method-assign]
    _, reports = play(
        job, link, initial, tmp_path / "j", watch=Looking(), pause=lambda seconds: None
    )
    assert [report.updates for report in reports] == [1, 1, 1], "no step is spent on nobody"
    assert {number for number, _, _ in waited} == {2, 3}
    assert all(have < need == 4 for _, have, need in waited)


@pytest.mark.parametrize("crash_after", [3, 17, 18, 19, 20, 21, 22, 40])
def test_a_run_that_was_interrupted_keeps_its_steps_and_counts_nothing_twice(
    make_link: MakeLink, initial: Tensors, tmp_path: Path, crash_after: int
) -> None:
    class StoppedError(Exception):
        pass

    def crash(count: int) -> None:
        if count >= crash_after:
            raise StoppedError

    path = tmp_path / "j"
    link = AsyncLink(make_link(JOB, CLIENTS), on_answer=crash)
    with pytest.raises(StoppedError):
        play(JOB, link, initial, path)
    with Journal(path, keep_answers=True) as journal:
        committed = [report["round"] for report in journal.reports(JOB.hash())]
        waiting = {kept.nonce for kept in journal.kept_answers(JOB.hash())}
    arrived = sum(plan is None for _, plan, _ in link.log)
    assert len(waiting) == arrived - 4 * len(committed), "whatever came is used or waits"
    again = AsyncLink(make_link(JOB, CLIENTS))
    _, reports = play(JOB, again, initial, path)
    assert [*committed, *(report.round for report in reports)] == list(range(1, 13))
    with Journal(path) as journal:
        rows = journal._db.execute("SELECT nonce, round FROM updates").fetchall()
    assert Counter(number for _, number in rows) == dict.fromkeys(range(1, 13), 4)
    counted = {nonce for nonce, _ in rows}
    assert len(counted) == len(rows) == 48 and waiting <= counted


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"rounds": replace(ROUNDS, clients_per_round=5)}, "rounds.clients_per_round"),
        ({"rounds": replace(ROUNDS, quorum=5)}, "rounds.quorum"),
        ({"rounds": replace(ROUNDS, deadline_s=5.0)}, "rounds.deadline_s"),
        ({"rounds": replace(ROUNDS, min_updates=5)}, "rounds.min_updates"),
        ({"update": UpdateSection(downlink="changes")}, "update.downlink"),
        ({"update": UpdateSection(error_feedback=True)}, "update.error_feedback"),
        ({"aggregation": AggregationSection(merger="flora")}, "aggregation.merger"),
        ({"aggregation": AggregationSection(merger="median")}, "aggregation.merger"),
        (
            {
                "training": TrainingSection(scaffold=True),
                "aggregation": AggregationSection(weighting="uniform"),
            },
            "training.scaffold",
        ),
        ({"personal": PersonalSection(tensors="classifier.*")}, "personal.tensors"),
        (
            {
                "method": MethodSpec(name="sfprompt"),
                "simulation": SimulationSection(backend="sequential"),
            },
            "method.name",
        ),
    ],
)
def test_what_does_not_go_with_it_is_refused(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(JobError) as caught:
        replace(JOB, **changes)
    assert [fault.key for fault in caught.value.faults] == [key]
