# SPDX-License-Identifier: Apache-2.0
"""A federation in numpy: real plans and updates, a trainer of three lines, no Flower."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from client_sdk.memory import FolderMemory
from client_sdk.updates import respond
from coordinator.job import Job
from coordinator.link import Failure, Outgoing, never
from protocol.factors import FactorPair
from protocol.manifest import Manifest, Preprocessing, TrainingSpec
from protocol.readiness import Readiness
from protocol.rejection import RejectionCode
from protocol.tensors import NOTHING, ParamSpec, Tensors

INITIAL = {
    "b": np.zeros(3, np.float32),
    "w": np.linspace(-1, 1, 64, dtype=np.float32).reshape(16, 4),
}


class DriftTrainer:
    """Moves every tensor towards a client's mean, with noise by the plan's seed."""

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
        rng = np.random.default_rng(seed)
        goal = np.float32(data["x"].mean())
        trained = {
            name: value
            + np.float32(learning_rate)
            * (goal - value + rng.standard_normal(value.shape, np.float32))
            for name, value in sorted(tensors.items())
        }
        return trained, {"loss": float(abs(goal))}

    def evaluate(
        self, tensors: Tensors, data: Tensors, *, offset: Tensors = NOTHING
    ) -> Mapping[str, float]:
        return {"accuracy": float(1 / (1 + abs(data["x"].mean()))), "loss": 1.0}


def manifest_of(
    job: Job, initial: Tensors = INITIAL, pairs: tuple[FactorPair, ...] = ()
) -> Manifest:
    return Manifest(
        job=job.hash(),
        backbone="none",
        method="none",
        task="classification",
        class_names=("a", "b"),
        trainable=ParamSpec.of(initial),
        state=ParamSpec(()),
        inputs=(),
        preprocessing=Preprocessing(kind="array"),
        training=TrainingSpec(
            batch_size=8, optimizer="sgd", learning_rate=0.1, scaffold=job.training.scaffold
        ),
        graphs={},
        pairs=pairs,
    )


@dataclass
class FakeLink:
    """Clients in this process; `meddle` may change what one answers, `order` the order."""

    job: Job
    clients: Sequence[str]
    meddle: Callable[[str, bytes], bytes | Failure] = lambda client, blob: blob
    order: Callable[[list[str]], list[str]] = lambda clients: clients
    held_out: int = 4
    memory: Path | None = None
    """Where clients keep what they keep between rounds; None: they cannot."""
    initial: Tensors = field(default_factory=lambda: INITIAL)
    pairs: tuple[FactorPair, ...] = ()
    asked: list[Outgoing] = field(default_factory=list)

    says: Callable[[str], Readiness] = lambda client: Readiness()
    revoked: set[str] = field(default_factory=set)

    def survey(self, job: str) -> Mapping[str, Readiness]:
        assert job == self.job.hash()
        return {client: self.says(client) for client in self.clients}

    def refused(self, client: str) -> Failure | None:
        reason = "revoked by the test"
        failure = Failure(code=RejectionCode.REVOKED, reason=reason)
        return failure if client in self.revoked else None

    def exchange(
        self, outgoing: Iterable[Outgoing | None], *, closed: Callable[[], bool] = never
    ) -> Generator[tuple[str, bytes | Failure]]:
        plans = {message.client: message for message in outgoing if message is not None}
        self.asked.extend(plans.values())
        for client in self.order(list(plans)):
            yield client, self._answer(client, plans[client].blob)

    def _answer(self, client: str, plan: bytes) -> bytes | Failure:
        number = self.clients.index(client)
        data = {
            "x": np.full(5 + number, number, np.float32),
            "labels": np.zeros(5 + number, np.int64),
        }
        held_out = {name: value[: self.held_out] for name, value in data.items()}
        try:
            blob = respond(
                plan,
                bundle_manifest=manifest_of(self.job, self.initial, self.pairs),
                initial=self.initial,
                trainer=DriftTrainer(),
                data_fit=data,
                data_held_out=held_out,
                client=client,
                memory=FolderMemory.of(self.memory, client) if self.memory else None,
            )
        except Exception as error:
            return Failure(code=RejectionCode.CLIENT_FAILED, reason=str(error))
        return self.meddle(client, blob)


@pytest.fixture
def initial() -> dict[str, np.ndarray]:
    return {name: value.copy() for name, value in INITIAL.items()}


@pytest.fixture
def make_link() -> type[FakeLink]:
    return FakeLink
