# SPDX-License-Identifier: Apache-2.0
"""SCAFFOLD through the round loop, on clients whose optima differ."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from client_sdk.memory import FolderMemory
from client_sdk.updates import respond
from coordinator.job import Job
from coordinator.journal import Journal
from coordinator.link import Failure, Outgoing
from coordinator.rounds import run_rounds
from coordinator.sections import (
    AggregationSection,
    DataSection,
    RoundsSection,
    TrainingSection,
    UpdateSection,
)
from protocol.manifest import Manifest, Preprocessing, TrainingSpec
from protocol.readiness import Readiness
from protocol.rejection import RejectionCode
from protocol.tensors import NOTHING, ParamSpec, Tensors

# Client i has the loss a_i / 2 (w - b_i)^2: the optimum of all is no mean of the b_i.
SLOPES = {"ada": 0.1, "ben": 1.0, "cyd": 4.0}
OPTIMA = {"ada": -3.0, "ben": 1.0, "cyd": 2.0}
BEST = sum(SLOPES[n] * OPTIMA[n] for n in SLOPES) / sum(SLOPES.values())
INITIAL = {"w": np.zeros(3, np.float32)}
STEPS, RATE = 6, 0.2


def job_of(scaffold: bool, rounds: int, per_round: int = 0) -> Job:
    return Job(
        data=DataSection(clients=3, held_out=0.0),
        training=TrainingSection(learning_rate=RATE, batch_size=1, scaffold=scaffold),
        aggregation=AggregationSection(weighting="uniform"),
        rounds=RoundsSection(count=rounds, clients_per_round=per_round),
    )


class Quadratic:
    """Plain gradient descent on one client's loss."""

    def __init__(self, client: str) -> None:
        self.slope, self.optimum = SLOPES[client], OPTIMA[client]

    def fit(
        self,
        tensors: Tensors,
        data: Tensors,
        *,
        learning_rate: float,
        epochs: int,
        seed: int,
        most_steps: int = 0,
        frozen: Collection[str] = (),
        correction: Tensors = NOTHING,
        offset: Tensors = NOTHING,
    ) -> tuple[Tensors, Mapping[str, float]]:
        w = tensors["w"].astype(np.float64)
        for _ in range(STEPS):
            gradient = self.slope * (w - self.optimum)
            w = w - learning_rate * (gradient + correction.get("w", 0.0))
        return {"w": w.astype(np.float32)}, {"loss": 0.0}

    def evaluate(
        self, tensors: Tensors, data: Tensors, *, offset: Tensors = NOTHING
    ) -> Mapping[str, float]:
        raise AssertionError("nothing is held back")


@dataclass
class QuadraticLink:
    job: Job
    memory: Path
    lost: str = ""
    """A client whose answers never come."""

    def survey(self, job: str) -> Mapping[str, Readiness]:
        return dict.fromkeys(SLOPES, Readiness())

    def refused(self, client: str) -> Failure | None:
        return None

    def exchange(
        self, outgoing: Iterable[Outgoing], *, closed: Callable[[], bool]
    ) -> Iterator[tuple[str, bytes | Failure]]:
        spec = TrainingSpec(
            batch_size=1, optimizer="sgd", learning_rate=RATE, scaffold=self.job.training.scaffold
        )
        manifest = Manifest(
            job=self.job.hash(), backbone="none", method="none", task="classification",
            class_names=("a", "b"), trainable=ParamSpec.of(INITIAL), state=ParamSpec(()),
            inputs=(), preprocessing=Preprocessing(kind="array"), training=spec, graphs={},
        )  # fmt: skip
        for message in outgoing:
            if message.client == self.lost:
                yield message.client, Failure(code=RejectionCode.NO_REPLY, reason="lost")
                continue
            yield (
                message.client,
                respond(
                    message.blob,
                    bundle_manifest=manifest,
                    initial=INITIAL,
                    trainer=Quadratic(message.client),
                    data_fit={"labels": np.zeros(STEPS, np.int64)},
                    data_held_out={},
                    client=message.client,
                    memory=FolderMemory.of(self.memory, message.client),
                ),
            )


def play(job: Job, folder: Path, lost: str = "", stop_after: int = 0) -> tuple[float, list[int]]:
    folder.mkdir(exist_ok=True)
    sizes: list[int] = []

    class CutOffError(Exception):
        pass

    def on_round(report) -> None:
        assert report.updates == report.clients - len(report.rejections)
        sizes.append(report.uplink_bytes)
        if len(sizes) == stop_after:
            raise CutOffError

    with Journal(folder / "journal") as journal:
        try:
            result = run_rounds(
                job,
                ParamSpec.of(INITIAL),
                INITIAL,
                QuadraticLink(job, folder / "memory", lost),
                journal,
                on_round,
                lambda tensors, offset: {"loss": float(tensors["w"].mean())},
            )
        except CutOffError:
            return float("nan"), sizes
    assert result.tensors.keys() == INITIAL.keys(), "controls are no part of the result"
    return float(result.tensors["w"][0]), sizes


def oracle(rounds: int) -> float:
    """Algorithm 1 with option II, all clients in every round, in float64."""
    x, c = 0.0, 0.0
    own = dict.fromkeys(SLOPES, 0.0)
    for _ in range(rounds):
        ys, changes = [], []
        for name in SLOPES:
            y = x
            for _ in range(STEPS):
                y -= RATE * (SLOPES[name] * (y - OPTIMA[name]) - own[name] + c)
            after = own[name] - c + (x - y) / (STEPS * RATE)
            changes.append(after - own[name])
            own[name] = after
            ys.append(y)
        x += sum(y - x for y in ys) / len(ys)
        c += sum(changes) / len(changes)
    return x


@pytest.mark.parametrize("rounds", [1, 2, 7])
def test_rounds_are_the_algorithm_s(rounds: int, tmp_path: Path) -> None:
    found, _ = play(job_of(True, rounds), tmp_path / "r")
    assert found == pytest.approx(oracle(rounds), abs=1e-5)


def test_clients_that_drift_apart_meet_at_the_optimum_of_all(tmp_path: Path) -> None:
    drifted, small = play(job_of(False, 60), tmp_path / "plain")
    found, large = play(job_of(True, 60), tmp_path / "scaffold")
    assert found == pytest.approx(BEST, abs=1e-3)
    assert abs(drifted - BEST) > 0.1, "the problem has no drift to correct"
    assert large[0] > small[0]


def test_few_clients_a_round_still_meet_there(tmp_path: Path) -> None:
    found, _ = play(job_of(True, 300, per_round=2), tmp_path / "few")
    assert found == pytest.approx(BEST, abs=1e-2)


def test_a_client_that_is_never_heard_leaves_the_others_their_optimum(tmp_path: Path) -> None:
    found, _ = play(job_of(True, 80), tmp_path / "lost", lost="cyd")
    heard = [name for name in SLOPES if name != "cyd"]
    best = sum(SLOPES[n] * OPTIMA[n] for n in heard) / sum(SLOPES[n] for n in heard)
    # The mean over all clients counts the missing one as unchanged.
    assert abs(found - best) < abs(found - BEST)


def test_a_run_that_is_cut_off_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole, _ = play(job_of(True, 5), tmp_path / "whole")
    play(job_of(True, 5), tmp_path / "halves", stop_after=2)
    resumed, _ = play(job_of(True, 5), tmp_path / "halves")
    assert resumed == whole


def test_compressed_controls_reach_it_with_feedback(tmp_path: Path) -> None:
    job = replace(job_of(True, 80), update=UpdateSection(codec="int8", error_feedback=True))
    found, _ = play(job, tmp_path / "int8")
    assert found == pytest.approx(BEST, abs=0.05)
