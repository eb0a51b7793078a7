# SPDX-License-Identifier: Apache-2.0
"""Clients in one graph, by a stand-in for the graph: who is where, and what one's fault costs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from client_sdk.errors import PlanError, TrainingError
from client_sdk.updates import sample_count
from edge_runtime.trainer import OnnxTrainer
from protocol.plan import Plan, pack_plan
from protocol.rejection import RejectionCode
from protocol.update import unpack_update
from simulations.backends.cohort import CohortClients
from simulations.backends.prepared import PreparedClient


class Recorder:
    """Counts what each place is given; trains by adding the sum of the weights to all tensors."""

    def __init__(self) -> None:
        self.weights: list[np.ndarray] = []

    def run(
        self,
        trainable: Mapping[str, np.ndarray],
        state: Mapping[str, np.ndarray],
        steps: Iterable[Mapping[str, np.ndarray]],
        learning_rate: float,
        *,
        frozen: Collection[str],
        offset: Mapping[str, np.ndarray],
    ) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, np.ndarray]]:
        seen = [step["weight"].copy() for step in steps]
        self.weights.append(np.stack(seen))
        total = self.weights[-1].sum(axis=(0, 2))
        trained = {
            name: value + total.reshape(-1, *[1] * (value.ndim - 1)).astype(np.float32)
            for name, value in trainable.items()
        }
        return trained, np.ones((len(seen), len(total)), np.float32), {}


def no_evaluation(*_: Any) -> Any:
    raise AssertionError("nothing is evaluated here")


def cohort_of(made: Any, loop: Any, size: int, clients: Any, evaluate: Any) -> CohortClients:
    manifest = made.bundle.manifest
    return CohortClients(manifest, made.bundle.initial(), loop, size, evaluate, clients)


@pytest.fixture
def federation(make_bundle: Callable[..., Any]) -> tuple[Any, list[PreparedClient]]:
    made = make_bundle("head")
    clients = [
        PreparedClient(id=f"c{n}", fit=made.data(samples, seed=n), held_out=made.data(held, seed=9))
        if held
        else PreparedClient(id=f"c{n}", fit=made.data(samples, seed=n), held_out={})
        for n, (samples, held) in enumerate([(3, 2), (11, 0), (8, 5), (5, 1), (1, 0)])
    ]
    return made, clients


def work_for(
    made: Any, clients: Sequence[PreparedClient], task: str = "fit"
) -> list[tuple[str, str, bytes]]:
    from aggregation.codecs import codec_named

    payload = codec_named("float32").encode(made.start())
    return [
        (
            client.id,
            task,
            pack_plan(
                Plan(
                    job=made.job.hash(), round=1, nonce="ab" * 16, client=client.id,
                    downlink_codec="float32", uplink_codec="float32", task=task,  # type: ignore[arg-type]
                    learning_rate=0.1, local_epochs=1, seed=number, max_update_bytes=1 << 20,
                ),
                payload,
            ),
        )
        for number, client in enumerate(clients)
    ]  # fmt: skip


def test_longest_clients_come_first_and_the_last_cohort_is_filled_up(federation: Any) -> None:
    made, clients = federation
    loop = Recorder()
    cohort = cohort_of(made, loop, 2, clients, no_evaluation)
    answers = dict(cohort.serve(work_for(made, clients)))
    # Steps of batch 4: c1 3, c2 2, c3 2, then c0 and c4 with one each.
    per_step = [weights.sum(axis=2).tolist() for weights in loop.weights]
    assert per_step == [[[4, 4], [4, 4], [3, 0]], [[4, 3], [1, 0]], [[1, 0]]]
    for client in clients:
        header, _ = unpack_update(answers[client.id], max_bytes=1 << 20)  # type: ignore[arg-type]
        assert header.client == client.id
        assert header.samples == sample_count(client.fit)
        assert header.metrics == {"loss": 1.0}


def test_update_is_of_the_client_in_its_place(federation: Any) -> None:
    from aggregation.codecs import codec_named

    made, clients = federation
    spec = made.bundle.manifest.trainable
    cohort = cohort_of(made, Recorder(), 3, clients, no_evaluation)
    for name, answer in cohort.serve(work_for(made, clients)):
        assert isinstance(answer, bytes)
        _, payload = unpack_update(answer, max_bytes=1 << 20)
        delta = codec_named("float32").decode(payload, spec, spec.nbytes)
        samples = next(sample_count(c.fit) for c in clients if c.id == name)
        for value in delta.values():
            np.testing.assert_allclose(value, samples, atol=1e-5)


def test_plan_that_cannot_be_read_is_one_clients_failure(federation: Any) -> None:
    made, clients = federation
    cohort = cohort_of(made, Recorder(), 5, clients, no_evaluation)
    work = work_for(made, clients)
    work[1] = (*work[1][:2], work[1][2][:-3])
    answers = dict(cohort.serve(work))
    assert isinstance(answers["c1"], PlanError)
    assert all(isinstance(answers[c.id], bytes) for c in clients if c.id != "c1")


def test_tensors_that_are_not_finite_are_one_clients_failure(federation: Any) -> None:
    made, clients = federation

    class Diverging(Recorder):
        def run(
            self, *inputs: Any, frozen: Any, offset: Any
        ) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, np.ndarray]]:
            trained, losses, counts = super().run(*inputs, frozen=frozen, offset=offset)
            trained["classifier.bias"][2] = np.inf
            return trained, losses, counts

    cohort = cohort_of(made, Diverging(), 5, clients, no_evaluation)
    answers = dict(cohort.serve(work_for(made, clients)))
    faults = {name for name, answer in answers.items() if isinstance(answer, TrainingError)}
    assert faults == {"c3"}  # the third of the longest
    assert sum(isinstance(answer, bytes) for answer in answers.values()) == 4


def test_evaluation_in_one_go_gives_each_client_its_own_figures(federation: Any) -> None:
    made, clients = federation
    trainer = OnnxTrainer(made.bundle, threads=1)
    cohort = cohort_of(made, Recorder(), 2, clients, trainer.evaluate_samples)
    answers = dict(cohort.serve(work_for(made, clients, "evaluate")))
    for client in clients:
        header, payload = unpack_update(answers[client.id], max_bytes=1 << 20)  # type: ignore[arg-type]
        assert not len(payload)
        if sample_count(client.held_out):
            alone = trainer.evaluate(made.start(), client.held_out)
            assert header.metrics == pytest.approx(alone, abs=1e-5)
            assert header.samples == sample_count(client.held_out)
        else:
            assert header.metrics == {}


@pytest.mark.parametrize("backend", ["cohort", "sequential"])
def test_one_clients_broken_data_are_its_own_rejection(
    play_rounds: Callable[..., Any], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from coordinator.sections import RoundsSection, SimulationSection
    from simulations.backends import play

    real = play.prepare

    def spoilt(client: Any, *others: Any) -> PreparedClient:
        prepared = real(client, *others)
        if client.id == "client-0001":
            prepared.fit["pixel_values"][0] = np.nan  # type: ignore[index]
        return prepared

    monkeypatch.setattr(play, "prepare", spoilt)
    played = play_rounds(
        rounds=RoundsSection(count=2),
        simulation=SimulationSection(backend=backend, cohort_size=2),
    )
    for report in played.reports:
        (rejection,) = report.rejections
        assert rejection.client == "client-0001"
        assert rejection.code == RejectionCode.CLIENT_FAILED
        assert "loss became nan" in rejection.reason
        assert report.updates == report.clients - 1
    assert all(np.isfinite(value).all() for value in played.tensors.values())
