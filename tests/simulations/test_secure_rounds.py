# SPDX-License-Identifier: Apache-2.0
"""Whole rounds of which the server sees the sum of updates and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregation.codecs import SumCodec, codec_named, round_seeds
from aggregation.summed_weights import FULL
from client_sdk.memory import FolderMemory
from client_sdk.summing import Summand, held
from coordinator.privacy_section import PrivacySection
from coordinator.sections import (
    AggregationSection,
    DataSection,
    RoundsSection,
    SimulationSection,
    UpdateSection,
)
from protocol.summing import unpack_sum_request
from protocol.tensors import ParamSpec
from protocol.update import unpack_update

SECURE = PrivacySection(secure_aggregation=True)
UNIFORM = AggregationSection(weighting="uniform")
ONCE = RoundsSection(count=1)
GRID = UpdateSection(codec="grid:8,0.5")
VOTES = UpdateSection(codec="votes:0.2", error_feedback=True)

Work = list[tuple[str, str, bytes]]
Answers = Iterator[tuple[str, bytes | Exception]]


@pytest.fixture
def play_sums(
    make_setup: Callable[..., Any], sign_setup: Callable[..., Any], tmp_path: Path
) -> Callable[..., Any]:
    """Play a tiny job with secure sums; `between` is asked before each message is answered, and
    what it gives is the answer in its place."""
    from coordinator.journal import Journal
    from simulations.backends.play import play
    from simulations.backends.summing import SummingClients

    def run(
        method: str = "ssf",
        *,
        between: Callable[[str, str, bytes], Exception | None] = lambda *_: None,
        **options: Any,
    ) -> Any:
        options = {
            "privacy": SECURE, "update": GRID, "aggregation": UNIFORM, "rounds": ONCE, **options,
        }  # fmt: skip
        setup = make_setup(method, **options)
        folder = tmp_path / "run"
        folder.mkdir()
        bundle = sign_setup(setup, folder / "bundle")
        reports: list[Any] = []
        served = SummingClients.serve

        def serve(self: SummingClients, work: Work) -> Answers:
            open_ = []
            for name, kind, blob in work:
                instead = between(name, kind, blob)
                if instead is None:
                    open_.append((name, kind, blob))
                else:
                    yield name, instead
            for name, answer in served(self, open_):
                if isinstance(answer, bytes):
                    seen.append((name, answer))
                yield name, answer

        seen: list[tuple[str, bytes]] = []
        with pytest.MonkeyPatch.context() as patch, Journal(folder / "journal.sqlite") as journal:
            patch.setattr(SummingClients, "serve", serve)
            result = play(setup, bundle, folder, journal, reports.append)
        return setup, bundle, folder, reports, dict(result.tensors), seen

    return run


def mean_of(setup: Any, folder: Path, names: list[str], spec: ParamSpec, round: int) -> Any:
    """What clients kept for a round, added in the clear."""
    codec = codec_named(setup.job.update.codec)
    assert isinstance(codec, SumCodec)
    kept = [held(FolderMemory.of(folder / "memory", name), round).integers(32) for name in names]
    seeds = round_seeds(setup.job.hash(), round)
    return codec.mean(np.sum(kept, axis=0, dtype=np.uint64), len(names), spec, seeds=seeds)


@pytest.mark.parametrize(
    ("method", "update", "aggregation", "backend"),
    [
        ("ssf", GRID, UNIFORM, "cohort"),
        ("lora", GRID, AggregationSection(weighting="uniform", factors="up"), "sequential"),
        ("one-bit-adapter", VOTES, UNIFORM, "cohort"),
    ],
)
def test_the_tensors_move_by_the_mean_of_what_clients_kept_for_themselves(
    play_sums: Callable[..., Any],
    method: str,
    update: UpdateSection,
    aggregation: AggregationSection,
    backend: str,
) -> None:
    setup, bundle, folder, (report,), tensors, seen = play_sums(
        method,
        update=update,
        aggregation=aggregation,
        simulation=SimulationSection(backend=backend),
    )
    names = [client.id for client in setup.federation.clients]
    first = bundle.initial()
    moved = [name for name in first if not np.array_equal(first[name], tensors[name])]
    part = ParamSpec.of({n: first[n] for n in moved})
    mean = mean_of(setup, folder, names, part, 1)
    for name in moved:
        np.testing.assert_allclose(tensors[name] - first[name], mean[name], atol=1e-6)
    assert report.updates == len(names) and not report.rejections and not report.note
    assert report.samples == report.updates, "how many samples a client has stays with it"
    assert not report.per_client_accuracy, "nobody tells of its tests unasked"
    fits = [answer for name, answer in seen if answer.startswith(b"FLUP")]
    assert len(fits) == len(names)
    for answer in fits:
        header, payload = unpack_update(answer, max_bytes=len(answer))
        assert not len(payload) and set(header.metrics) == {"loss"}


def rms(values: Any) -> float:
    return float(np.sqrt(np.mean(np.concatenate([np.ravel(v) for v in values]) ** 2)))


def test_weighted_updates_are_summed_with_their_weights_and_nothing_else_is_told(
    play_sums: Callable[..., Any], play_rounds: Callable[..., Any]
) -> None:
    """As in the clear, to what the grid's steps leave."""
    full_at = 20
    weighted = AggregationSection(weighting="samples", full_weight_samples=full_at)
    setup, bundle, folder, (report,), tensors, seen = play_sums(
        aggregation=weighted, update=UpdateSection(codec="grid:12,2.0")
    )
    counts = {client.id: len(client.fit["labels"]) for client in setup.federation.clients}
    assert report.updates == len(counts) and not report.note
    assert max(counts.values()) > full_at > min(counts.values()), "or the test shows little"
    for name, answer in seen:
        if answer.startswith(b"FLUP"):
            header, payload = unpack_update(answer, max_bytes=len(answer))
            assert (header.samples, set(header.metrics)) == (1, {"loss"}) and not len(payload)
            kept = held(FolderMemory.of(folder / "memory", name), 1)
            assert kept.weight == min(counts[name], full_at) * FULL // full_at
    clear = play_rounds("ssf", aggregation=weighted, rounds=ONCE).tensors
    plain = play_rounds("ssf", aggregation=UNIFORM, rounds=ONCE).tensors
    codec, spec = codec_named("grid:12,2.0"), bundle.manifest.shared
    assert isinstance(codec, SumCodec)
    total = sum(min(n, full_at) / full_at for n in counts.values())
    bound = codec.step(spec) / 2 * len(counts) ** 0.5 / total
    assert rms(tensors[name] - clear[name] for name in spec.names) < bound
    assert rms(plain[name] - clear[name] for name in spec.names) > 10 * bound


def test_a_masked_median_takes_the_steps_that_it_takes_where_updates_are_seen(
    play_sums: Callable[..., Any], play_rounds: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second round starts from the first one's end: a device must have got that as it is."""
    smoothing = 0.1
    median = AggregationSection(weighting="uniform", merger=f"masked-geometric-median:{smoothing}")
    twice = RoundsSection(count=2)
    codec = codec_named(f"grid:12,{smoothing}")
    setup, bundle, folder, reports, tensors, _ = play_sums(
        aggregation=median, rounds=twice, update=UpdateSection(codec=codec.name)
    )
    names = [client.id for client in setup.federation.clients]
    assert [report.updates for report in reports] == [len(names)] * 2
    weights = [
        [held(FolderMemory.of(folder / "memory", name), number).weight / FULL for name in names]
        for number in (1, 2)
    ]
    assert 0 < min(map(min, weights)) < 0.9, "some of them are far away, or the test shows little"
    # No such job is offered in the clear, where it would be worth less than the median itself.
    monkeypatch.setattr("coordinator.job.summing_faults", lambda job: [])
    clear = play_rounds("ssf", aggregation=median, rounds=twice).tensors
    plain = play_rounds("ssf", aggregation=UNIFORM, rounds=twice).tensors
    spec = bundle.manifest.shared
    assert isinstance(codec, SumCodec)
    # What a round is off by is trained on in the next: twice a round's bound, and as much again.
    bound = 4 * codec.step(spec) / 2 * len(names) ** 0.5 / min(map(sum, weights))
    assert rms(tensors[name] - clear[name] for name in spec.names) < bound
    assert rms(plain[name] - clear[name] for name in spec.names) > 10 * bound


def test_the_sum_is_of_those_who_stayed(play_sums: Callable[..., Any]) -> None:
    """One is lost before its vector came, one after: of the first nothing is in the sum."""
    asked: dict[str, int] = {}

    def between(name: str, kind: str, blob: bytes) -> Exception | None:
        if kind != "sum":
            return None
        assert unpack_sum_request(blob).client == name
        asked[name] = asked.get(name, 0) + 1
        lost = {"client-0000": 3, "client-0001": 4}
        return RuntimeError("its battery is empty") if asked[name] >= lost.get(name, 9) else None

    # Of eight with a threshold of four two may be lost; of five with three only one.
    data = DataSection(dataset="digits", clients=8, max_train_samples=90, max_test_samples=40)
    setup, bundle, folder, (report,), tensors, _ = play_sums(between=between, data=data)
    stayed = [c.id for c in setup.federation.clients if c.id != "client-0000"]
    assert report.updates == len(stayed) == 7
    spec = bundle.manifest.shared
    mean, first = mean_of(setup, folder, stayed, spec, 1), bundle.initial()
    for name in spec.names:
        np.testing.assert_allclose(tensors[name] - first[name], mean[name], atol=1e-6)
    assert {rejection.client for rejection in report.rejections} == {"client-0000", "client-0001"}
    assert all("battery" in rejection.reason for rejection in report.rejections)


def test_too_few_leave_everything_as_it_is_and_say_why(play_sums: Callable[..., Any]) -> None:
    def between(name: str, kind: str, blob: bytes) -> Exception | None:
        gone = kind == "sum" and name > "client-0001"
        return RuntimeError("gone") if gone else None

    _, bundle, _, (report,), tensors, _ = play_sums(between=between)
    assert report.updates == 0
    assert "no secure sum" in report.note and "too-few" in report.note
    for name, value in bundle.initial().items():
        np.testing.assert_array_equal(tensors[name], value)


def test_a_sum_of_what_are_no_updates_leaves_everything_as_it_is(
    play_sums: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client of its own making can add integers beyond the grid: its doing, and no crash."""
    integers = Summand.integers

    def beyond(self: Summand, bits: int) -> np.ndarray:
        return integers(self, bits) * 0 + (1 << bits) - 1

    monkeypatch.setattr(Summand, "integers", beyond)
    _, bundle, _, (report,), tensors, _ = play_sums()
    assert report.updates == 0
    assert "no secure sum: sums: expected 0 to" in report.note
    for name, value in bundle.initial().items():
        np.testing.assert_array_equal(tensors[name], value)
