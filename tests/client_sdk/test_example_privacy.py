# SPDX-License-Identifier: Apache-2.0
"""A device holds its coordinator to what a job's privacy was accounted for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregation.codecs import codec_named
from client_sdk.errors import PlanError
from client_sdk.example_privacy import charge
from client_sdk.memory import FolderMemory
from client_sdk.updates import respond
from protocol.example_privacy import ExamplePrivacy
from protocol.manifest import Manifest, Preprocessing, TrainingSpec
from protocol.plan import Plan, pack_plan
from protocol.tensors import ParamSpec
from protocol.update import unpack_update

TENSORS = {"w": np.ones(3, np.float32)}
PRIVACY = ExamplePrivacy(noise_multiplier=1.0, clip=1.0, fewest_samples=8, steps=4, rounds=3)
PRIVATE = Manifest(
    job="ab" * 32,
    backbone="none",
    method="none",
    task="classification",
    class_names=("a", "b"),
    trainable=ParamSpec.of(TENSORS),
    state=ParamSpec(()),
    inputs=(),
    preprocessing=Preprocessing(kind="array"),
    training=TrainingSpec(batch_size=8, optimizer="sgd", learning_rate=0.1, privacy=PRIVACY),
    graphs={},
)
PLAIN = replace(PRIVATE, training=replace(PRIVATE.training, privacy=None))
PLAN = Plan(
    job=PRIVATE.job,
    round=2,
    nonce="cd" * 16,
    client="c1",
    downlink_codec="float32",
    uplink_codec="float32",
    task="fit",
    learning_rate=0.5,
    local_epochs=1,
    local_steps=4,
    seed=9,
    max_update_bytes=10_000,
)
DATA = {"labels": np.zeros(9, np.int64)}


class Trainer:
    """Counts how often it trains or tests."""

    asked = 0

    def fit(self, tensors: Any, data: Any, **_: Any) -> tuple[Any, Mapping[str, float]]:
        self.asked += 1
        return tensors, {"loss": 0.25, "selected/0": 3.0}

    def evaluate(self, tensors: Any, data: Any, *, offset: Any) -> Mapping[str, float]:
        self.asked += 1
        return {"accuracy": 1.0}


def test_rounds_are_counted_and_the_first_beyond_them_is_refused(tmp_path: Path) -> None:
    for number in range(3):
        # A device that is started again goes on counting.
        charge(replace(PLAN, nonce=f"{number:032x}"), PRIVATE, 9, FolderMemory(tmp_path))
    with pytest.raises(PlanError, match="at most 3 rounds of 4 private steps"):
        charge(replace(PLAN, nonce="ff" * 16), PRIVATE, 9, FolderMemory(tmp_path))
    # The last one comes again, after a crash: it was charged.
    charge(replace(PLAN, nonce=f"{2:032x}"), PRIVATE, 9, FolderMemory(tmp_path))


def test_rounds_that_go_backwards_are_counted_too(tmp_path: Path) -> None:
    memory = FolderMemory(tmp_path)
    for number in (9, 5, 1):
        charge(replace(PLAN, round=number, nonce=f"{number:032x}"), PRIVATE, 9, memory)
    with pytest.raises(PlanError, match="at most 3 rounds"):
        charge(replace(PLAN, round=1, nonce="ff" * 16), PRIVATE, 9, memory)


@pytest.mark.parametrize(
    ("change", "samples", "words"),
    [
        ({"local_steps": 0}, 9, "expected local_steps = 4.*found 0"),
        ({"local_steps": 5}, 9, "expected local_steps = 4.*found 5"),
        ({}, 7, "clients of at least 8 samples, this one has fewer"),
        ({"task": "evaluate"}, 9, "expected training alone"),
    ],
)
def test_plan_beyond_the_promise_is_refused_before_the_data_are_touched(
    tmp_path: Path, change: dict[str, Any], samples: int, words: str
) -> None:
    trainer, memory = Trainer(), FolderMemory(tmp_path)
    data = {"labels": np.zeros(samples, np.int64)}
    blob = pack_plan(replace(PLAN, **change), codec_named("float32").encode(TENSORS))
    with pytest.raises(PlanError, match=words):
        respond(
            blob,
            bundle_manifest=PRIVATE,
            initial=TENSORS,
            trainer=trainer,
            data_fit=data,
            data_held_out=data,
            client="c1",
            memory=memory,
        )
    assert trainer.asked == 0
    assert not list(tmp_path.iterdir())


def test_client_that_cannot_remember_takes_no_part() -> None:
    with pytest.raises(PlanError, match="keeps tensors between rounds"):
        charge(PLAN, PRIVATE, 9, None)


def test_job_that_is_not_private_costs_nothing(tmp_path: Path) -> None:
    charge(replace(PLAN, task="evaluate"), PLAIN, 0, None)
    charge(replace(PLAN, local_steps=99), PLAIN, 1, FolderMemory(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("private", [True, False])
def test_metrics_leave_the_client_only_where_its_samples_are_not_private(
    tmp_path: Path, private: bool
) -> None:
    asking = replace(PLAN, tells=("loss", "selected"))
    blob = respond(
        pack_plan(asking, codec_named("float32").encode(TENSORS)),
        bundle_manifest=PRIVATE if private else PLAIN,
        initial=TENSORS,
        trainer=Trainer(),
        data_fit=DATA,
        data_held_out={},
        client="c1",
        memory=FolderMemory(tmp_path),
    )
    header, _ = unpack_update(blob, max_bytes=10_000)
    assert header.metrics == ({} if private else {"loss": 0.25, "selected/0": 3.0})
