# SPDX-License-Identifier: Apache-2.0
"""The round loop, over clients in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregation.codecs import codec_named
from client_sdk.memory import FolderMemory
from coordinator.clients import client_seed
from coordinator.errors import NoClientsError
from coordinator.job import Job
from coordinator.journal import Journal
from coordinator.link import Failure
from coordinator.reports import RoundReport
from coordinator.rounds import run_rounds
from coordinator.sections import AggregationSection, DataSection, RoundsSection, UpdateSection
from protocol.plan import unpack_plan
from protocol.rejection import RejectionCode
from protocol.tensors import ParamSpec, Tensors
from protocol.update import pack_update, unpack_update

CLIENTS = ("ada", "ben", "cyd", "dan", "eve")
JOB = Job(
    data=DataSection(clients=5),
    rounds=RoundsSection(count=4, evaluate_every=2),
)
MakeLink = Callable[..., Any]


def accuracy_of(tensors: Tensors, offset: Tensors) -> Mapping[str, float]:
    return {"accuracy": 0.5, "loss": float(np.abs(tensors["w"]).mean())}


def play(
    job: Job, link: Any, initial: Tensors, path: Path, on_round: Callable[..., None] | None = None
) -> tuple[Tensors, list[RoundReport]]:
    reports: list[RoundReport] = []
    with Journal(path) as journal:
        result = run_rounds(
            job,
            ParamSpec.of(initial),
            initial,
            link,
            journal,
            on_round or reports.append,
            accuracy_of,
        )
    return result.tensors, reports


def same_bits(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(
        left[name].tobytes() == right[name].tobytes() for name in left
    )


def test_one_round_is_the_weighted_mean_of_what_clients_trained(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    job = replace(JOB, rounds=RoundsSection(count=1))
    link = make_link(job, CLIENTS)
    final, (report,) = play(job, link, initial, tmp_path / "j")
    total = {name: np.zeros(value.shape) for name, value in initial.items()}
    weights = 0
    for message in link.asked:
        if message.kind != "fit":
            continue
        header, payload = unpack_update(link._answer(message.client, message.blob), max_bytes=10**6)
        delta = codec_named("float32").decode(payload, ParamSpec.of(initial), 10**6)
        for name in total:
            total[name] += header.samples * delta[name].astype(float)
        weights += header.samples
    for name, value in initial.items():
        np.testing.assert_allclose(final[name], value + total[name] / weights, atol=1e-6)
    assert report.samples == weights == 5 + 6 + 7 + 8 + 9
    assert report.updates == report.clients == 5
    assert report.train_loss == pytest.approx((0 * 5 + 1 * 6 + 2 * 7 + 3 * 8 + 4 * 9) / weights)


def test_weights_are_equal_when_weighting_is_uniform(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    job = replace(
        JOB, rounds=RoundsSection(count=1), aggregation=AggregationSection(weighting="uniform")
    )
    by_samples = replace(JOB, rounds=RoundsSection(count=1))
    uniform, _ = play(job, make_link(job, CLIENTS), initial, tmp_path / "a")
    weighted, _ = play(by_samples, make_link(by_samples, CLIENTS), initial, tmp_path / "b")
    assert not same_bits(uniform, weighted)


def test_a_client_beyond_the_full_weight_weighs_as_one_that_has_it(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    """They have 5 to 9 samples."""
    finals = []
    for most in (0, 9, 7, 5):
        settings = AggregationSection(full_weight_samples=most)
        job = replace(JOB, rounds=RoundsSection(count=1), aggregation=settings)
        final, _ = play(job, make_link(job, CLIENTS), initial, tmp_path / f"j{most}")
        finals.append(final)
    uniform = replace(
        JOB, rounds=RoundsSection(count=1), aggregation=AggregationSection(weighting="uniform")
    )
    plain, _ = play(uniform, make_link(uniform, CLIENTS), initial, tmp_path / "uniform")
    none, nine, seven, five = finals
    assert same_bits(none, nine)
    assert not same_bits(nine, seven) and not same_bits(seven, five)
    for name in plain:
        np.testing.assert_allclose(five[name], plain[name], atol=1e-6)


def test_result_does_not_depend_on_the_order_of_answers(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    straight, _ = play(JOB, make_link(JOB, CLIENTS), initial, tmp_path / "a")
    backwards = make_link(JOB, CLIENTS, order=lambda clients: clients[::-1])
    reverse, _ = play(JOB, backwards, initial, tmp_path / "b")
    assert same_bits(straight, reverse)


ADAM_JOB = replace(
    JOB,
    aggregation=replace(JOB.aggregation, server_optimizer="adam", server_learning_rate=0.01),
)


@pytest.mark.parametrize("job", [JOB, ADAM_JOB], ids=["averaging", "adam"])
def test_resumed_run_gives_the_same_bits_as_an_undisturbed_one(
    make_link: MakeLink, initial: Tensors, tmp_path: Path, job: Job
) -> None:
    whole, reports = play(job, make_link(job, CLIENTS), initial, tmp_path / "whole")

    def stop_after_two(report: RoundReport) -> None:
        if report.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        play(job, make_link(job, CLIENTS), initial, tmp_path / "halves", stop_after_two)
    resumed, later = play(job, make_link(job, CLIENTS), initial, tmp_path / "halves")
    assert same_bits(whole, resumed)
    assert [report.round for report in later] == [3, 4]
    with Journal(tmp_path / "halves") as journal:
        kept = [RoundReport.from_json(report) for report in journal.reports(job.hash())]
    strip = {"seconds": 0.0, "fit_seconds": 0.0}
    assert [replace(r, **strip) for r in kept] == [replace(r, **strip) for r in reports]
    again, none = play(job, make_link(job, CLIENTS), initial, tmp_path / "halves")
    assert same_bits(whole, again) and not none


LOSSY = UpdateSection(
    codec="one-bit", error_feedback=True, downlink="changes", downlink_codec="one-bit"
)


def test_run_of_compressed_changes_is_resumed_with_the_same_bits(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    job = replace(JOB, update=LOSSY)
    link = make_link(job, CLIENTS, memory=tmp_path / "a")
    whole, reports = play(job, link, initial, tmp_path / "whole")
    assert all(report.updates == 5 and not report.rejections for report in reports)
    plain = make_link(JOB, CLIENTS)
    _, whole_reports = play(JOB, plain, initial, tmp_path / "plain")
    assert reports[1].downlink_bytes < whole_reports[1].downlink_bytes
    bases = [
        unpack_plan(m.blob, max_bytes=10**6)[0].base_round for m in link.asked if m.kind == "fit"
    ]
    assert bases == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5

    def break_in_the_third(client: str, blob: bytes) -> bytes:
        header, _ = unpack_update(blob, max_bytes=10**6)
        if header.round == 3 and client == "dan":
            raise KeyboardInterrupt
        return blob

    # Ada, Ben and Cyd have moved on by a round that the server has not committed.
    broken = make_link(job, CLIENTS, memory=tmp_path / "b", meddle=break_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        play(job, broken, initial, tmp_path / "halves")
    again = make_link(job, CLIENTS, memory=tmp_path / "b")
    resumed, _ = play(job, again, initial, tmp_path / "halves")
    assert same_bits(whole, resumed)


def test_client_that_lost_its_memory_misses_one_round_and_is_sent_the_tensors_whole(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    job = replace(JOB, update=LOSSY)

    def forget(report: RoundReport) -> None:
        reports.append(report)
        if report.round == 2:
            shutil.rmtree(FolderMemory.of(tmp_path / "m", "cyd")._folder)

    reports: list[RoundReport] = []
    link = make_link(job, CLIENTS, memory=tmp_path / "m")
    play(job, link, initial, tmp_path / "j", forget)
    assert [report.updates for report in reports] == [5, 5, 4, 5]
    ((rejection,),) = [report.rejections for report in reports if report.rejections]
    assert (
        rejection.client == "cyd" and "expected to hold the tensors of round 2" in rejection.reason
    )
    plans = [unpack_plan(m.blob, max_bytes=10**6)[0] for m in link.asked if m.kind == "fit"]
    assert [plan.base_round for plan in plans if plan.client == "cyd"] == [0, 1, 2, None]


def test_error_feedback_is_refused_by_clients_that_keep_nothing(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    job = replace(JOB, update=UpdateSection(codec="one-bit", error_feedback=True))
    final, reports = play(job, make_link(job, CLIENTS), initial, tmp_path / "j")
    assert same_bits(final, initial) and reports[0].updates == 0
    assert all("keeps tensors between rounds" in r.reason for r in reports[0].rejections)


def test_round_that_broke_in_the_middle_is_played_again(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    whole, _ = play(JOB, make_link(JOB, CLIENTS), initial, tmp_path / "whole")
    calls = 0

    def break_once(client: str, blob: bytes) -> bytes:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise ConnectionError("the coordinator's network is gone")
        return blob

    link = make_link(JOB, CLIENTS, meddle=break_once)
    with pytest.raises(ConnectionError):
        play(JOB, link, initial, tmp_path / "broken")
    resumed, reports = play(JOB, link, initial, tmp_path / "broken")
    assert same_bits(whole, resumed)
    assert [report.round for report in reports] == [2, 3, 4]
    with Journal(tmp_path / "broken") as journal:
        attempts = journal._db.execute("SELECT attempts FROM rounds ORDER BY round").fetchall()
    assert attempts == [(1,), (2,), (1,), (1,)]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda blob: blob[:-1], RejectionCode.TRUNCATED),
        (lambda blob: blob + b"x", RejectionCode.TOO_LONG),
        (lambda blob: blob + bytes(10**6), RejectionCode.TOO_LONG),
        (lambda blob: b"", RejectionCode.TRUNCATED),
        (lambda blob: b"garbage, but rather long garbage", RejectionCode.MALFORMED),
        (lambda blob: blob[:40] + b"!" + blob[41:], RejectionCode.CORRUPTED),
    ],
)
def test_garbage_is_rejected_and_counted_and_the_round_goes_on(
    make_link: MakeLink,
    initial: Tensors,
    tmp_path: Path,
    change: Callable[[bytes], bytes],
    code: RejectionCode,
) -> None:
    job = replace(JOB, data=DataSection(clients=5, held_out=0.0), rounds=RoundsSection(count=1))
    link = make_link(job, CLIENTS, meddle=lambda c, blob: change(blob) if c == "cyd" else blob)
    _, (report,) = play(job, link, initial, tmp_path / "j")
    (rejection,) = report.rejections
    assert (rejection.client, rejection.round, rejection.code) == ("cyd", 1, code)
    assert report.updates == 4 and report.clients == 5
    with Journal(tmp_path / "j") as journal:
        assert journal.rejections(job.hash()) == [rejection]


def altered(blob: bytes, **changes: Any) -> bytes:
    header, payload = unpack_update(blob, max_bytes=10**6)
    payload = changes.pop("payload", payload)
    return pack_update(replace(header, **changes), payload)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"job": "ab" * 32}, RejectionCode.WRONG_JOB),
        ({"round": 2}, RejectionCode.WRONG_ROUND),
        ({"nonce": "00" * 16}, RejectionCode.WRONG_NONCE),
        ({"client": "ada"}, RejectionCode.WRONG_CLIENT),
        ({"codec": "float16"}, RejectionCode.WRONG_CODEC),
        ({"samples": 1_000_001}, RejectionCode.BAD_WEIGHT),
        ({"payload": b""}, RejectionCode.TRUNCATED),
        ({"payload": np.full(67, np.nan, "<f4").tobytes()}, RejectionCode.NOT_FINITE),
    ],
)
def test_valid_container_is_rejected_when_it_does_not_fit_its_plan(
    make_link: MakeLink,
    initial: Tensors,
    tmp_path: Path,
    changes: dict[str, Any],
    code: RejectionCode,
) -> None:
    job = replace(JOB, data=DataSection(clients=5, held_out=0.0), rounds=RoundsSection(count=1))
    link = make_link(
        job, CLIENTS, meddle=lambda c, blob: altered(blob, **changes) if c == "eve" else blob
    )
    final, (report,) = play(job, link, initial, tmp_path / "j")
    assert [(r.client, r.code) for r in report.rejections] == [("eve", code)]
    honest = make_link(
        job,
        CLIENTS,
        meddle=lambda c, blob: (
            Failure(code=RejectionCode.NO_REPLY, reason="silent") if c == "eve" else blob
        ),
    )
    without, (quiet,) = play(job, honest, initial, tmp_path / "k")
    assert same_bits(final, without)
    assert quiet.uplink_bytes < report.uplink_bytes


def test_run_goes_on_when_finite_updates_sum_to_infinity(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    huge = np.full(67, 3.4e38, "<f4").tobytes()
    job = replace(
        JOB,
        data=DataSection(clients=5, held_out=0.0),
        rounds=RoundsSection(count=1),
        aggregation=AggregationSection(server_learning_rate=100),
    )
    link = make_link(job, CLIENTS, meddle=lambda c, blob: altered(blob, payload=huge))
    final, (report,) = play(job, link, initial, tmp_path / "j")
    assert same_bits(final, initial)
    assert report.note.startswith("tensors unchanged: tensor")


def test_tensors_stay_and_the_report_says_so_when_updates_are_too_few(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    job = replace(JOB, rounds=RoundsSection(count=1, min_updates=3))
    link = make_link(job, CLIENTS, meddle=lambda c, blob: blob if c in ("ada", "ben") else b"")
    final, (report,) = play(job, link, initial, tmp_path / "j")
    assert same_bits(final, initial)
    assert report.updates == 2
    assert report.note == ("tensors unchanged: 2 valid updates, rounds.min_updates asks for 3")


def test_a_round_goes_on_with_its_quorum_and_leaves_the_late_out(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    job = replace(JOB, rounds=RoundsSection(count=1, quorum=2))
    # The last of them comes first; what cannot be read does not count.
    link = make_link(
        job,
        CLIENTS,
        meddle=lambda client, blob: blob[:9] if client == CLIENTS[-1] else blob,
        order=lambda clients: clients[::-1],
    )
    final, (report,) = play(job, link, initial, tmp_path / "quorum")
    assert report.clients == 5 and report.updates == 2
    codes = {rejection.client: rejection.code for rejection in report.rejections}
    assert codes == {
        CLIENTS[4]: RejectionCode.TRUNCATED,
        CLIENTS[1]: RejectionCode.LATE,
        CLIENTS[0]: RejectionCode.LATE,
    }
    # The same as if nobody else had been there.
    few = make_link(job, CLIENTS, meddle=lambda name, blob: blob if name in CLIENTS[2:4] else b"")
    expected, _ = play(job, few, initial, tmp_path / "few")
    assert same_bits(final, expected)


def test_second_answer_of_a_client_is_rejected(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    job = replace(JOB, data=DataSection(clients=5, held_out=0.0), rounds=RoundsSection(count=1))
    link = make_link(job, CLIENTS, order=lambda clients: [*clients, clients[0]])
    _, (report,) = play(job, link, initial, tmp_path / "j")
    assert [(r.client, r.code) for r in report.rejections] == [("ada", RejectionCode.DUPLICATE)]
    assert report.updates == 5


def test_bytes_are_those_that_the_link_carried(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    job = replace(JOB, rounds=RoundsSection(count=1), update=UpdateSection(codec="one-bit"))
    sent: list[int] = []

    def measure(client: str, blob: bytes) -> bytes:
        sent.append(len(blob))
        return blob

    link = make_link(job, CLIENTS, meddle=measure)
    _, (report,) = play(job, link, initial, tmp_path / "j")
    fits = [len(message.blob) for message in link.asked if message.kind == "fit"]
    tests = [len(message.blob) for message in link.asked if message.kind == "evaluate"]
    assert report.downlink_bytes == sum(fits) > 5 * 67 * 4
    assert report.uplink_bytes == sum(sent[:5])
    assert report.evaluation_bytes == sum(sent[5:]) + sum(tests)


def test_global_tensors_are_tested_as_often_as_asked_and_at_the_end(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    job = replace(JOB, rounds=RoundsSection(count=5, evaluate_every=2, evaluate_clients_every=3))
    _, reports = play(job, make_link(job, CLIENTS), initial, tmp_path / "j")
    assert [report.accuracy is not None for report in reports] == [False, True, False, True, True]
    assert [bool(report.per_client_accuracy) for report in reports] == [
        False,
        False,
        True,
        False,
        True,
    ]
    assert reports[-1].per_client_accuracy == {
        client: pytest.approx(1 / (1 + number)) for number, client in enumerate(CLIENTS)
    }


def test_client_has_no_accuracy_when_it_holds_nothing_back(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    job = replace(JOB, rounds=RoundsSection(count=1))
    _, (report,) = play(job, make_link(job, CLIENTS, held_out=0), initial, tmp_path / "j")
    assert report.per_client_accuracy == {} and report.rejections == ()


def test_evaluation_that_brings_tensors_is_rejected(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    job = replace(JOB, rounds=RoundsSection(count=1))

    def stuff(client: str, blob: bytes) -> bytes:
        _, payload = unpack_update(blob, max_bytes=10**6)
        return blob if len(payload) else altered(blob, payload=b"1234")

    _, (report,) = play(job, make_link(job, CLIENTS, meddle=stuff), initial, tmp_path / "j")
    assert {r.code for r in report.rejections} == {RejectionCode.TOO_LONG}
    assert report.updates == 5 and not report.per_client_accuracy


def test_accuracy_out_of_range_is_rejected(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    job = replace(JOB, rounds=RoundsSection(count=1))

    def boast(client: str, blob: bytes) -> bytes:
        return altered(blob, metrics={"accuracy": 2.0}) if client == "ada" else blob

    _, (report,) = play(job, make_link(job, CLIENTS, meddle=boast), initial, tmp_path / "j")
    (rejection,) = report.rejections
    assert rejection.reason == "answer: expected an accuracy of 0 to 1, found 2"
    assert sorted(report.per_client_accuracy) == ["ben", "cyd", "dan", "eve"]


def test_test_that_gives_nan_is_noted_and_the_run_goes_on(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    job = replace(JOB, rounds=RoundsSection(count=2))
    reports: list[RoundReport] = []
    with Journal(tmp_path / "j") as journal:
        run_rounds(
            job,
            ParamSpec.of(initial),
            initial,
            make_link(job, CLIENTS),
            journal,
            reports.append,
            lambda tensors, offset: {"accuracy": 0.0, "loss": float("nan")},
        )
    assert [(r.accuracy, r.loss, r.note) for r in reports] == [(0.0, None, "test: loss is nan")] * 2


def test_plans_name_their_client_and_seeds_differ(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    link = make_link(JOB, CLIENTS)
    play(JOB, link, initial, tmp_path / "j")
    plans = [(m.client, unpack_plan(m.blob, max_bytes=10**6)[0]) for m in link.asked]
    assert all(client == plan.client for client, plan in plans)
    fits = [plan for _, plan in plans if plan.task == "fit"]
    assert len({plan.seed for plan in fits}) == len({plan.nonce for plan in fits}) == 20
    assert fits[7].seed == client_seed(0, fits[7].round, fits[7].client)


def test_report_is_json_and_comes_back_the_same(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    link = make_link(JOB, CLIENTS, meddle=lambda c, blob: b"" if c == "ben" else blob)
    _, reports = play(JOB, link, initial, tmp_path / "j")
    for report in reports:
        assert RoundReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_nobody_to_ask_is_an_error(make_link: MakeLink, initial: Tensors, tmp_path: Path) -> None:
    with pytest.raises(NoClientsError, match="round 1: expected at least one client"):
        play(JOB, make_link(JOB, ()), initial, tmp_path / "j")


def test_one_bit_both_ways_does_not_drift_from_the_server_s_tensors(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    update = UpdateSection(
        codec="one-bit", error_feedback=True, downlink="changes", downlink_codec="one-bit"
    )
    job = replace(
        JOB,
        data=DataSection(clients=5, held_out=0.0),
        rounds=RoundsSection(count=60, evaluate_every=60),
        update=update,
    )
    apart: list[float] = []

    def on_round(report: RoundReport) -> None:
        moments = journal.moments(job.hash(), report.round)
        _, tensors = journal.open_run(job.hash(), "", initial)
        squares = [
            float(np.square(tensors[name] - moments[f"downlink/{name}"]).sum()) for name in tensors
        ]
        apart.append(sum(squares) ** 0.5)

    with Journal(tmp_path / "j") as journal:
        final = run_rounds(
            job,
            ParamSpec.of(initial),
            initial,
            make_link(job, CLIENTS, memory=tmp_path / "memory"),
            journal,
            on_round,
            accuracy_of,
        ).tensors
    # What clients hold follows what the server has: the distance stays what a few rounds move.
    assert len(apart) == 60 and max(apart[30:]) < 2 * max(apart[:30])
    whole = replace(job, update=UpdateSection())
    plain, _ = play(whole, make_link(whole, CLIENTS), initial, tmp_path / "plain")
    moved = sum(float(np.square(plain[n] - initial[n]).sum()) for n in plain) ** 0.5
    off = sum(float(np.square(plain[n] - final[n]).sum()) for n in plain) ** 0.5
    assert off < 0.2 * moved
