# SPDX-License-Identifier: Apache-2.0
"""From a plan to an update."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from aggregation.codecs import codec_named
from client_sdk.errors import PlanError, TrainingError
from client_sdk.updates import close_update, respond
from client_sdk.work import Work, open_plan
from protocol.manifest import Manifest, Preprocessing, TrainingSpec
from protocol.plan import Plan, pack_plan
from protocol.tensors import NOTHING, ParamSpec, Tensors
from protocol.update import unpack_update

TENSORS = {"a": np.linspace(-1, 1, 40, dtype=np.float32), "b": np.ones((2, 2), np.float32)}
MANIFEST = Manifest(
    job="ab" * 32,
    backbone="none",
    method="none",
    task="classification",
    class_names=("a", "b"),
    trainable=ParamSpec.of(TENSORS),
    state=ParamSpec(()),
    inputs=(),
    preprocessing=Preprocessing(kind="array"),
    training=TrainingSpec(batch_size=8, optimizer="sgd", learning_rate=0.1),
    graphs={},
)
PLAN = Plan(
    job=MANIFEST.job,
    round=2,
    nonce="cd" * 16,
    client="c1",
    downlink_codec="float32",
    uplink_codec="float32",
    task="fit",
    learning_rate=0.5,
    local_epochs=3,
    local_steps=2,
    seed=9,
    max_update_bytes=10_000,
)
WORK = Work(plan=PLAN, start=TENSORS)
FIT = {"x": np.ones((7, 2), np.float32), "labels": np.zeros(7, np.int64)}
HELD_OUT = {"x": np.ones((2, 2), np.float32), "labels": np.zeros(2, np.int64)}


class PlusOne:
    """Adds one to every value, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

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
        self.asked.append((len(data["labels"]), learning_rate, epochs, seed, most_steps))
        trained = {name: value + (name not in frozen) for name, value in tensors.items()}
        return trained, {"loss": 0.25}

    def evaluate(
        self, tensors: Tensors, data: Tensors, *, offset: Tensors = NOTHING
    ) -> Mapping[str, float]:
        return {"accuracy": 0.5, "loss": float(np.float32(len(data["labels"])))}


def blob_of(plan: Plan, tensors: Tensors = TENSORS) -> bytes:
    return pack_plan(plan, codec_named(plan.downlink_codec).encode(tensors))


def answer(blob: bytes, client: str = "c1", held_out: Tensors = HELD_OUT) -> bytes:
    return respond(
        blob,
        bundle_manifest=MANIFEST,
        initial=TENSORS,
        trainer=PlusOne(),
        data_fit=FIT,
        data_held_out=held_out,
        client=client,
    )


@pytest.mark.parametrize("codec", ["float32", "float16", "one-bit"])
def test_update_is_the_difference_that_training_made(codec: str) -> None:
    blob = answer(blob_of(replace(PLAN, uplink_codec=codec)))
    header, payload = unpack_update(blob, max_bytes=10_000)
    assert (header.job, header.round, header.nonce) == (PLAN.job, 2, PLAN.nonce)
    assert (header.client, header.codec, header.samples) == ("c1", codec, 7)
    assert header.metrics == {"loss": 0.25}
    delta = codec_named(codec).decode(payload, MANIFEST.trainable, MANIFEST.trainable.nbytes)
    for tensor in delta.values():
        np.testing.assert_allclose(tensor, 1, atol=1e-6)


def test_trainer_is_told_what_the_plan_says() -> None:
    trainer = PlusOne()
    respond(
        blob_of(PLAN),
        bundle_manifest=MANIFEST,
        initial=TENSORS,
        trainer=trainer,
        data_fit=FIT,
        data_held_out={},
        client="c1",
    )
    assert trainer.asked == [(7, 0.5, 3, 9, 2)]


def test_difference_is_taken_from_what_the_client_saw_when_the_downlink_is_lossy() -> None:
    plan = replace(PLAN, downlink_codec="float16")
    seen = open_plan(blob_of(plan), MANIFEST, TENSORS).start
    assert not np.array_equal(seen["a"], TENSORS["a"])
    _, payload = unpack_update(answer(blob_of(plan)), max_bytes=10_000)
    delta = codec_named("float32").decode(payload, MANIFEST.trainable, 10_000)
    assert np.array_equal(delta["a"], (seen["a"] + 1) - seen["a"])


def test_evaluation_brings_metrics_and_no_tensors() -> None:
    header, payload = unpack_update(
        answer(blob_of(replace(PLAN, task="evaluate"))), max_bytes=10_000
    )
    assert len(payload) == 0
    assert header.metrics == {"accuracy": 0.5, "loss": 2.0} and header.samples == 2


@pytest.mark.parametrize("held_out", [{}, {name: value[:0] for name, value in HELD_OUT.items()}])
def test_evaluation_is_answered_without_metrics_when_nothing_is_held_back(
    held_out: Tensors,
) -> None:
    blob = answer(blob_of(replace(PLAN, task="evaluate")), held_out=held_out)
    assert unpack_update(blob, max_bytes=10_000)[0].metrics == {}


def test_arguments_are_left_as_they_were() -> None:
    tensors = {name: value.copy() for name, value in TENSORS.items()}
    for value in (*tensors.values(), *FIT.values()):
        value.setflags(write=False)
    answer(blob_of(PLAN, tensors))
    for value in FIT.values():
        value.setflags(write=True)


@pytest.mark.parametrize(
    ("blob", "words"),
    [
        (blob_of(PLAN)[:-1], "container: expected"),
        (blob_of(replace(PLAN, job="ef" * 32)), "fetch its bundle"),
        (blob_of(PLAN, {"a": TENSORS["a"]}), "payload: expected 176 bytes, found 160"),
        (pack_plan(replace(PLAN, downlink_codec="zip"), b""), "codec: expected one of"),
        (pack_plan(PLAN, np.full(44, np.nan, "<f4").tobytes()), "finite"),
        (blob_of(replace(PLAN, client="c2")), "expected one for client c1, found one for c2"),
    ],
)
def test_plan_is_refused_when_it_is_not_for_this_client(blob: bytes, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        answer(blob)


def test_training_is_refused_when_it_gave_other_or_infinite_tensors() -> None:
    with pytest.raises(TrainingError, match='"b" is missing'):
        close_update(WORK, MANIFEST, {"a": TENSORS["a"]}, {}, 7)
    wild = {**TENSORS, "b": np.full((2, 2), np.inf, np.float32)}
    with pytest.raises(TrainingError, match=r"learning rate 0\.5 may be too high"):
        close_update(WORK, MANIFEST, wild, {}, 7)


def test_update_is_refused_when_it_exceeds_the_plans_budget() -> None:
    with pytest.raises(TrainingError, match="expected at most 100 bytes"):
        close_update(
            replace(WORK, plan=replace(PLAN, max_update_bytes=100)), MANIFEST, TENSORS, {}, 7
        )


def test_an_update_is_clipped_before_it_is_encoded_where_the_plan_says_so() -> None:
    for codec in ("float32", "one-bit"):
        plan = replace(PLAN, clip=2.0, uplink_codec=codec)
        header, payload = unpack_update(answer(blob_of(plan)), max_bytes=10_000)
        delta = codec_named(codec).decode(payload, MANIFEST.trainable, MANIFEST.trainable.nbytes)
        # 44 values of 1 have the norm 6.6: each is cut to 2/√44.
        for tensor in delta.values():
            np.testing.assert_allclose(tensor, 2 / np.sqrt(44), rtol=1e-6)
        assert header.metrics == {"loss": 0.25}, (
            "whether it was cut is told only if it is asked for"
        )


def test_whether_an_update_was_clipped_is_told_where_the_plan_asks_for_it() -> None:
    for bound, unclipped in ((2.0, 0.0), (7.0, 1.0)):
        plan = replace(PLAN, clip=bound, tells=("unclipped",))
        header, _ = unpack_update(answer(blob_of(plan)), max_bytes=10_000)
        assert header.metrics == {"unclipped": unclipped}
    header, _ = unpack_update(
        answer(blob_of(replace(PLAN, tells=("unclipped",)))), max_bytes=10_000
    )
    assert header.metrics == {}


def test_an_update_that_is_short_enough_has_the_bits_that_it_has_without_clipping() -> None:
    payloads = [
        bytes(unpack_update(answer(blob_of(replace(PLAN, clip=x))), max_bytes=10_000)[1])
        for x in (0.0, 7.0)
    ]
    assert payloads[0] == payloads[1]
