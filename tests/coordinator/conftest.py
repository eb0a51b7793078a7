# SPDX-License-Identifier: Apache-2.0
"""A federation in numpy: real plans and updates, a trainer of three lines, no Flower."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client_sdk.errors import SumError
from client_sdk.memory import FolderMemory
from client_sdk.summing import FolderSums, answer_sum
from client_sdk.updates import respond
from coordinator.job import Job
from coordinator.link import Failure, Outgoing, never
from protocol.factors import FactorPair
from protocol.keys import new_key, public_pem, sign, verifier
from protocol.manifest import Manifest, Preprocessing, TrainingSpec
from protocol.readiness import Readiness
from protocol.rejection import RejectionCode
from protocol.summing import SUM_MAGIC
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
    known: set[str] = field(default_factory=set)
    """Who was there when somebody looked: nobody else can be reached."""

    says: Callable[[str], Readiness] = lambda client: Readiness()
    revoked: set[str] = field(default_factory=set)

    def survey(self, job: str) -> Mapping[str, Readiness]:
        assert job == self.job.hash()
        self.known.update(self.clients)
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
            if client in self.known:
                yield client, self._answer(client, plans[client].blob)
            else:
                yield client, Failure(code=RejectionCode.NO_REPLY, reason="not known to be there")

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


@dataclass
class SummingLink(FakeLink):
    """The same in secure sums, of which clients keep nothing but in their folders."""

    keys: Mapping[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        assert self.memory is not None
        self.keys = {client: new_key() for client in self.clients}

    def credentials(self, clients: Sequence[str]) -> Mapping[str, str]:
        return {client: public_pem(self.keys[client].public_key()) for client in clients}

    def _answer(self, client: str, plan: bytes) -> bytes | Failure:
        if not plan.startswith(SUM_MAGIC):
            return super()._answer(client, plan)
        assert self.memory is not None
        memory = FolderMemory.of(self.memory, client)
        try:
            answer = answer_sum(
                plan,
                client=client,
                memory=lambda job: memory,
                store=FolderSums(self.memory / client / "sums"),
                sign=lambda text: sign(text, self.keys[client]),
                trust=verifier,
            )
        except SumError as error:
            return Failure(code=RejectionCode.CLIENT_FAILED, reason=str(error))
        return self.meddle(client, answer)


@pytest.fixture
def initial() -> dict[str, np.ndarray]:
    return {name: value.copy() for name, value in INITIAL.items()}


@pytest.fixture
def make_link() -> type[FakeLink]:
    return FakeLink


@pytest.fixture
def make_summing_link() -> type[SummingLink]:
    return SummingLink
