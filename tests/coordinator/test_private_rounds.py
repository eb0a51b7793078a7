# SPDX-License-Identifier: Apache-2.0
"""Private rounds in the round engine: what is drawn, clipped, noised, charged for and told; and
crashes between charge and commit, which lose no charge and give no second release."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregation.codecs import codec_named
from aggregation.privacy import clip, in_steps, noised_mean
from aggregation.privacy.accountant import epsilon_of
from aggregation.privacy.clipping import l2_norm
from coordinator.errors import JobError, NoClientsError
from coordinator.job import Job
from coordinator.journal import Journal
from coordinator.link import Failure
from coordinator.privacy import Privacy
from coordinator.privacy_section import PrivacySection
from coordinator.reports import RoundReport
from coordinator.rounds import run_rounds
from coordinator.sections import AggregationSection, DataSection, RoundsSection, UpdateSection
from protocol.factors import FactorPair
from protocol.plan import unpack_plan
from protocol.readiness import Readiness
from protocol.rejection import RejectionCode
from protocol.tensors import ParamSpec, Tensors
from protocol.update import pack_update, unpack_update

CLIENTS = tuple(f"c{number:02d}" for number in range(20))
MakeLink = Callable[..., Any]


def job_of(*, count: int = 3, drawn: int = 10, codec: str = "float32", **settings: Any) -> Job:
    section = {"mode": "central", "noise_multiplier": 0.5, "clip": 0.3, **settings}
    return Job(
        data=DataSection(clients=20, held_out=0.0),
        update=UpdateSection(metrics="", codec=codec),
        aggregation=AggregationSection(weighting="uniform"),
        rounds=RoundsSection(count=count, clients_per_round=drawn),
        privacy=PrivacySection(**section),
    )


def seeded(number: int) -> bytes:
    return bytes([number]) * 32


def play(
    job: Job,
    link: Any,
    initial: Tensors,
    path: Path,
    *,
    on_round: Callable[[RoundReport], None] | None = None,
    seeds: Callable[[int], bytes] = seeded,
    evaluate: Callable[..., Mapping[str, float]] = lambda tensors, offset: {"accuracy": 0.5},
) -> tuple[Tensors, list[RoundReport]]:
    reports: list[RoundReport] = []
    with Journal(path, keep_tensors=0) as journal:
        result = run_rounds(
            job, ParamSpec.of(initial), initial, link, journal, on_round or reports.append,
            evaluate, seeds=seeds,
        )  # fmt: skip
    return result.tensors, reports


def bits(tensors: Tensors) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in tensors.items()}


def deltas_of(link: Any, initial: Tensors) -> dict[str, Tensors]:
    """What the clients that were asked sent."""
    found = {}
    for message in link.asked:
        _, payload = unpack_update(link._answer(message.client, message.blob), max_bytes=10**6)
        found[message.client] = codec_named("float32").decode(payload, ParamSpec.of(initial), 10**6)
    return found


def test_one_round_is_the_noised_sum_of_clipped_updates_over_who_was_expected(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    job = job_of(count=1)
    link = make_link(job, CLIENTS)
    final, (report,) = play(job, link, initial, tmp_path / "j")
    privacy = Privacy.of(job)
    assert privacy is not None
    drawn = privacy.draw(CLIENTS, seeded(1))
    sent = deltas_of(link, initial)
    assert sorted(sent) == drawn and report.clients == report.updates == len(drawn)
    assert len(drawn) != 10, "the test is to tell the expected number from the number that came"
    noise, spec = privacy.noise(0.3), ParamSpec.of(initial)
    assert all(0.29 < l2_norm(delta) <= 0.3 for delta in sent.values()), "devices clip"
    sums = sum(in_steps(spec, clip(delta, 0.3).delta, noise.step) for delta in sent.values())
    with sqlite3.connect(tmp_path / "j") as database:
        assert database.execute("SELECT seed FROM charges").fetchall() == [(None,)]
    change = spec.flatten(final).astype(float) - spec.flatten(initial)
    plain = sums * noise.step / 10
    deviation = 0.5 * 0.3 / 10
    assert 0.5 * deviation < np.std(change - plain) < 1.5 * deviation
    # ... and bit for bit, by the digest that keys the noise
    import hashlib

    use = f"update/{hashlib.sha256(sums.astype('<i8').tobytes()).hexdigest()}"
    mean = noised_mean(sums, noise, expected=10.0, seed=seeded(1), use=use)
    np.testing.assert_allclose(change, mean, atol=1e-6)


def test_a_client_that_does_not_clip_and_a_codec_that_overshoots_are_clipped_again(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    job = job_of(count=1, drawn=0, sampling="all", noise_multiplier=0.001)

    def greedy(client: str, blob: bytes) -> bytes:
        header, _ = unpack_update(blob, max_bytes=len(blob))
        if client != "c03":
            return blob
        huge = np.full(67, 1e30, np.float32).tobytes()
        return pack_update(header, huge)

    final, (report,) = play(job, make_link(job, CLIENTS, meddle=greedy), initial, tmp_path / "a")
    honest, _ = play(job, make_link(job, CLIENTS), initial, tmp_path / "b")
    assert report.updates == 20
    moved = l2_norm({name: final[name] - honest[name] for name in final})
    assert moved < 2 * 0.3 / 20 + 0.01


@pytest.mark.parametrize("codec", ["int8", "one-bit", "random-k:0.25"])
def test_lossy_codecs_go_with_it(
    codec: str, make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    job = job_of(count=1, codec=codec)
    _, (report,) = play(job, make_link(job, CLIENTS), initial, tmp_path / "j")
    assert report.updates == report.clients > 0


def test_rounds_depend_on_seeds_that_differ_from_run_to_run_unless_they_are_given(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    job = job_of(count=2)
    runs = [play(job, make_link(job, CLIENTS), initial, tmp_path / name)[0] for name in "ab"]
    assert bits(runs[0]) == bits(runs[1])
    secret = []
    for name in "cd":
        with Journal(tmp_path / name) as journal:
            result = run_rounds(
                job, ParamSpec.of(initial), initial, make_link(job, CLIENTS), journal,
                lambda report: None, lambda tensors, offset: {},
            )  # fmt: skip
        secret.append(bits(result.tensors))
    assert secret[0] != secret[1]


def test_who_is_drawn_does_not_depend_on_who_is_there_and_the_divisor_on_neither(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    job = job_of(count=1, noise_multiplier=0.001)
    privacy = Privacy.of(job)
    assert privacy is not None
    drawn = privacy.draw(CLIENTS, seeded(1))
    away = set(drawn[::2])

    def says(client: str) -> Readiness:
        return Readiness(ready=client not in away, reason="away")

    link = make_link(job, CLIENTS, says=says)
    final, (report,) = play(job, link, initial, tmp_path / "j")
    assert [message.client for message in link.asked] == [c for c in drawn if c not in away]
    sent = deltas_of(link, initial)
    for name, before in initial.items():
        wanted = sum(delta[name].astype(float) for delta in sent.values()) / 10
        np.testing.assert_allclose(final[name] - before, wanted, atol=1e-3)
    assert report.privacy["epsilon"] == epsilon_of(privacy.mechanism, 1, 1e-5)


def test_a_round_in_which_nobody_answers_is_released_and_charged_like_any_other(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    job = job_of(count=2)
    failure = Failure(code=RejectionCode.CLIENT_FAILED, reason="the battery")
    silent = make_link(job, CLIENTS, meddle=lambda client, blob: failure)
    final, reports = play(job, silent, initial, tmp_path / "j")
    assert [report.updates for report in reports] == [0, 0]
    assert bits(final) != bits(initial), "noise: whether anybody came is nobody's to know"
    spread = np.std(ParamSpec.of(initial).flatten(final) - ParamSpec.of(initial).flatten(initial))
    assert 0.5 < spread / (0.5 * 0.3 / 10 * np.sqrt(2)) < 1.5
    assert reports[1].privacy["epsilon"] > reports[0].privacy["epsilon"] > 0


def test_a_round_that_draws_nobody_is_played(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    job = job_of(count=5, drawn=1, population=40)
    link = make_link(job, CLIENTS)
    _, reports = play(job, link, initial, tmp_path / "j", evaluate=lambda tensors, offset: {})
    assert min(report.clients for report in reports) == 0
    assert "counts on 40 clients (privacy.population), 20 are enrolled" in reports[0].note
    assert "0.5 times as long" in reports[0].note and not any(r.note for r in reports[1:])
    assert len({report.privacy["epsilon"] for report in reports}) == 5


def test_the_norm_is_steered_to_the_quantile_and_clients_say_only_whether_they_were_cut(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    job = job_of(
        count=12, drawn=0, sampling="all", noise_multiplier=0.4, clip=0.05, clip_quantile=0.5,
        clip_rate=1.0,
    )  # fmt: skip
    link = make_link(job, CLIENTS)
    _, reports = play(job, link, initial, tmp_path / "j")
    norms = [report.privacy["clip"] for report in reports]
    assert norms[0] == 0.05
    for before, after, report in zip(norms, norms[1:], reports, strict=False):
        share = report.privacy["unclipped"]
        assert after == pytest.approx(before * np.exp(-(share - 0.5)), rel=1e-12)
    assert norms[-1] > 3 * norms[0], "all updates were longer"
    plans = [unpack_plan(message.blob, max_bytes=10**6)[0] for message in link.asked]
    assert {(plan.round, plan.clip) for plan in plans} == {
        (report.round, report.privacy["clip"]) for report in reports
    }
    assert {plan.tells for plan in plans} == {("unclipped",)}
    answer = link._answer(link.asked[0].client, link.asked[0].blob)
    header, _ = unpack_update(answer, max_bytes=10**6)
    assert header.metrics == {"unclipped": 0.0}
    text = json.dumps([report.to_json() for report in reports])
    assert reports[0].train_loss is None and "per_client_accuracy" in text


@pytest.mark.parametrize("told", [{}, {"unclipped": 0.5}, {"unclipped": 1000.0}])
def test_a_client_that_miscounts_is_refused(
    told: dict[str, float], make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    job = job_of(count=1, drawn=0, sampling="all", noise_multiplier=0.4, clip_quantile=0.5)

    def lies(client: str, blob: bytes) -> bytes:
        header, payload = unpack_update(blob, max_bytes=len(blob))
        return pack_update(replace(header, metrics=told), payload) if client == "c05" else blob

    _, (report,) = play(job, make_link(job, CLIENTS, meddle=lies), initial, tmp_path / "j")
    (rejection,) = report.rejections
    assert rejection.client == "c05" and "unclipped" in rejection.reason
    assert report.updates == 19


def test_the_job_ends_before_the_round_that_its_budget_does_not_cover(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    job = job_of(count=50, noise_multiplier=2.0, epsilon=4.0)
    privacy = Privacy.of(job)
    assert privacy is not None
    tested: list[int] = []

    def evaluate(tensors: Tensors, offset: Tensors) -> Mapping[str, float]:
        tested.append(1)
        return {"accuracy": 0.5}

    job = replace(job, rounds=replace(job.rounds, evaluate_every=50))
    link = make_link(job, CLIENTS)
    final, reports = play(job, link, initial, tmp_path / "j", evaluate=evaluate)
    done = len(reports)
    assert 1 < done < 50
    assert epsilon_of(privacy.mechanism, done, 1e-5) <= 4.0
    assert epsilon_of(privacy.mechanism, done + 1, 1e-5) > 4.0
    assert f"rounds {done + 1} to 50 are not played" in reports[-1].note
    assert "budget" not in "".join(report.note for report in reports[:-1])
    assert len(tested) == 1, "its last round is the last, and is tested"
    assert reports[-1].privacy["left"] == pytest.approx(4.0 - reports[-1].privacy["epsilon"])
    # Gone on with, it is at its end: nothing more is asked or released.
    again = make_link(job, CLIENTS)
    same, none = play(job, again, initial, tmp_path / "j")
    assert not none and not again.asked and bits(same) == bits(final)


def test_a_calibrated_job_plays_all_of_its_rounds_within_the_budget(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    job = job_of(count=6, noise_multiplier=0.0, epsilon=6.0)
    _, reports = play(job, make_link(job, CLIENTS), initial, tmp_path / "j")
    assert len(reports) == 6
    assert 5.9 < reports[-1].privacy["epsilon"] <= 6.0
    assert reports[-1].note == ""


def test_a_budget_that_covers_no_round_is_refused_before_anybody_is_asked(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    job = job_of(noise_multiplier=0.5, epsilon=0.01)
    link = make_link(job, CLIENTS)
    with pytest.raises(JobError, match=r"privacy\.epsilon = 0\.01: .*first round alone costs"):
        play(job, link, initial, tmp_path / "j")
    assert not link.asked


def test_samples_of_a_fixed_size_wait_for_every_client_that_is_counted_on(
    make_link: MakeLink, initial: Tensors, tmp_path: Path
) -> None:
    job = job_of(count=2, sampling="without-replacement", noise_multiplier=3.0)
    _, reports = play(job, make_link(job, CLIENTS), initial, tmp_path / "a")
    assert [report.clients for report in reports] == [10, 10]
    assert reports[0].privacy["neighbours"] == "replace one"
    with pytest.raises(NoClientsError, match="expected at least 20 clients"):
        play(job, make_link(job, CLIENTS[:19]), initial, tmp_path / "b")


def test_a_factor_that_is_not_trained_has_no_noise(make_link: MakeLink, tmp_path: Path) -> None:
    job = job_of(count=2)
    job = replace(job, aggregation=replace(job.aggregation, factors="up"))
    pair = FactorPair(down="a", up="b", scale=1.0)
    start: Tensors = {
        "a": np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4),
        "b": np.zeros((3, 2), np.float32),
    }
    reports: list[RoundReport] = []
    with Journal(tmp_path / "j") as journal:
        result = run_rounds(
            job, ParamSpec.of(start), start,
            make_link(job, CLIENTS, initial=start, pairs=(pair,)), journal, reports.append,
            lambda tensors, offset: {}, seeds=seeded, pairs=(pair,),
        )  # fmt: skip
    assert result.tensors["a"].tobytes() == start["a"].tobytes()
    assert (result.tensors["b"] != 0).all()
    assert reports[-1].updates == reports[-1].clients > 0


# Crashes


class CrashError(Exception):
    """The coordinator ends here."""


def interrupted(
    job: Job, link: Any, initial: Tensors, path: Path, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Play until the second round has come so far."""

    def crash(*args: Any, **options: Any) -> Any:
        raise CrashError

    with monkeypatch.context() as patch:
        if at == "exchange":
            whole = link.exchange

            def exchange(outgoing: Any, **options: Any) -> Any:
                plans = [message for message in outgoing if message is not None]
                for number, (client, answer) in enumerate(whole(plans, **options)):
                    if unpack_plan(plans[0].blob, max_bytes=10**6)[0].round == 2 and number == 2:
                        raise CrashError
                    yield client, answer

            patch.setattr(link, "exchange", exchange)
        elif at == "commit":
            inner = Journal.commit_round

            def commit(self: Journal, job: str, round: int, **content: Any) -> None:
                return crash() if round == 2 else inner(self, job, round, **content)

            patch.setattr(Journal, "commit_round", commit)
        else:
            from coordinator.merging import Step

            finish = Step.finish

            def finish_once(self: Step, *args: Any, **options: Any) -> Any:
                return crash() if self._number == 2 else finish(self, *args, **options)

            patch.setattr(Step, "finish", finish_once)
        with pytest.raises(CrashError):
            play(job, link, initial, path)


@pytest.mark.parametrize("at", ["exchange", "finish", "commit"])
def test_a_crash_between_charge_and_commit_loses_no_charge_and_releases_nothing_else(
    at: str,
    make_link: MakeLink,
    initial: Tensors,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = job_of(count=4, clip_quantile=0.5, drawn=18, noise_multiplier=0.6)
    whole, undisturbed = play(job, make_link(job, CLIENTS), initial, tmp_path / "whole")
    path = tmp_path / "journal"
    interrupted(job, make_link(job, CLIENTS), initial, path, at, monkeypatch)
    with Journal(path) as journal:
        charges = journal.charges(job.hash())
        assert [(charge.round, charge.seed) for charge in charges] == [(1, b""), (2, seeded(2))]
        assert [row["round"] for row in journal.reports(job.hash())] == [1], "nothing is visible"
        asked = journal.resume_round(job.hash(), 2)
        assert asked is not None

    # A seed that would be drawn anew is another: the one that was charged for has to be used.
    def other_seeds(number: int) -> bytes:
        assert number > 2, "a round is drawn and charged for once"
        return seeded(number)

    link = make_link(job, CLIENTS)
    final, reports = play(job, link, initial, path, seeds=other_seeds)
    again = [m.client for m in link.asked if unpack_plan(m.blob, max_bytes=10**6)[0].round == 2]
    assert sorted(again) == sorted(asked.nonces), "the same clients are asked"
    assert bits(final) == bits(whole)
    assert [report.round for report in reports] == [2, 3, 4]
    assert [report.privacy for report in reports] == [r.privacy for r in undisturbed[1:]]
    with Journal(path) as journal:
        assert [charge.round for charge in journal.charges(job.hash())] == [1, 2, 3, 4]
        assert not any(charge.seed for charge in journal.charges(job.hash()))
    assert seeded(2) not in path.read_bytes(), "what is let go is overwritten"


def test_a_round_that_is_played_again_on_other_updates_has_noise_of_its_own(
    make_link: MakeLink, initial: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(count=2, drawn=18)
    whole, _ = play(job, make_link(job, CLIENTS), initial, tmp_path / "whole")
    path = tmp_path / "journal"
    interrupted(job, make_link(job, CLIENTS), initial, path, "commit", monkeypatch)
    with Journal(path) as journal:
        start = journal.resume_round(job.hash(), 2)
        assert start is not None
    lost = min(start.nonces)
    failure = Failure(code=RejectionCode.CLIENT_FAILED, reason="gone since")
    link = make_link(job, CLIENTS, meddle=lambda client, blob: failure if client == lost else blob)
    final, _ = play(job, link, initial, path)
    difference = ParamSpec.of(initial).flatten(final) - ParamSpec.of(initial).flatten(whole)
    # With the same noise it would be the lost client's update over 18, of norm 0.3/18.
    assert np.linalg.norm(difference) > 2 * 0.3 / 18
    assert np.std(difference) == pytest.approx(np.sqrt(2) * 0.5 * 0.3 / 18, rel=0.3)


def test_a_begun_round_without_its_charge_is_not_played(
    make_link: MakeLink, initial: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from coordinator.errors import JournalConflictError

    job, path = job_of(count=2), tmp_path / "journal"
    interrupted(job, make_link(job, CLIENTS), initial, path, "commit", monkeypatch)
    with sqlite3.connect(path) as database:
        database.execute("DELETE FROM charges WHERE round = 2")
    link = make_link(job, CLIENTS)
    with pytest.raises(JournalConflictError, match="expected that its privacy is charged for"):
        play(job, link, initial, path)
    assert not link.asked
