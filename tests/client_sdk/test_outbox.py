# SPDX-License-Identifier: Apache-2.0
"""Updates that wait on disk, and plans that are asked again."""

from __future__ import annotations

import errno
import logging
import os
import stat
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aggregation.codecs import codec_named
from client_sdk.errors import OutboxError, PlanError
from client_sdk.memory import FolderMemory
from client_sdk.outbox import SET_ASIDE, Attempt, Outbox, answer_once
from client_sdk.split import respond_split
from client_sdk.updates import respond
from protocol.manifest import Manifest, Preprocessing, TrainingSpec
from protocol.plan import Plan, pack_plan
from protocol.tensors import ParamSpec, Tensors

JOB, OTHER = "ab" * 32, "cd" * 32
HEAD = 70  # bytes before an entry's update


def attempt(round: int = 1, *, job: str = JOB, nonce: str = "12" * 16) -> Attempt:
    return Attempt(job=job, round=round, nonce=nonce)


def rounds(outbox: Outbox) -> list[int]:
    return [entry.attempt.round for entry in outbox.entries()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "outbox"


# Keeping


def test_update_is_kept_until_it_is_acknowledged(folder: Path) -> None:
    Outbox(folder).put(attempt(), b"plan", b"update")
    assert Outbox(folder).get(attempt(), b"plan") == b"update"
    for other in (attempt(2), attempt(job=OTHER), attempt(nonce="34" * 16)):
        assert Outbox(folder).get(other, b"plan") is None
        Outbox(folder).acknowledge(other)
    (entry,) = Outbox(folder).entries()
    assert entry.attempt == attempt() and entry.size == HEAD + len(b"update")
    Outbox(folder).acknowledge(attempt())
    assert Outbox(folder).get(attempt(), b"plan") is None and Outbox(folder).entries() == []


def test_files_are_for_this_user_alone(folder: Path) -> None:
    before = os.umask(0)
    try:
        outbox = Outbox(folder)
        outbox.put(attempt(), b"plan", b"update")
        outbox.finish(JOB)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path.name


def test_the_same_update_is_kept_once_and_another_is_refused(folder: Path) -> None:
    outbox = Outbox(folder)
    for _ in range(2):
        outbox.put(attempt(), b"plan", b"update")
    assert len(outbox.entries()) == 1
    with pytest.raises(OutboxError, match="another update is kept for it already"):
        outbox.put(attempt(), b"plan", b"other")
    for ask in (outbox.get, lambda *which: outbox.put(*which, b"update")):
        with pytest.raises(OutboxError, match="asked with another plan before"):
            ask(attempt(), b"another plan")
    assert outbox.get(attempt(), b"plan") == b"update"


def test_rounds_that_the_coordinator_is_done_with_are_settled(folder: Path) -> None:
    outbox = Outbox(folder)
    for number in (1, 2, 3):
        outbox.put(attempt(number), b"plan", b"update")
    outbox.put(attempt(1, job=OTHER), b"plan", b"update")
    outbox.settle(JOB, before=3)
    assert [(e.attempt.job, e.attempt.round) for e in outbox.entries()] == [(JOB, 3), (OTHER, 1)]


@pytest.mark.parametrize(
    "wrong",
    [
        Attempt(job="../../etc/passwd", round=1, nonce="12" * 16),
        Attempt(job=JOB, round=1, nonce="x/y"),
        Attempt(job=JOB, round=-1, nonce="12" * 16),
    ],
)
def test_names_cannot_leave_the_folder(folder: Path, wrong: Attempt) -> None:
    with pytest.raises(OutboxError, match="expected a job and a nonce in hex digits"):
        Outbox(folder).put(wrong, b"plan", b"update")
    assert [path.name for path in folder.iterdir()] == ["lock"]


# Room


def test_oldest_of_finished_jobs_go_first_then_the_oldest_and_all_is_logged(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outbox = Outbox(folder, max_bytes=3 * (HEAD + 10))
    for number in (1, 2):
        outbox.put(attempt(number), b"plan", bytes(10))
    outbox.put(attempt(3, job=OTHER), b"plan", bytes(10))
    outbox.finish(OTHER)
    assert [entry.finished for entry in outbox.entries()] == [False, False, True]
    gone = []
    for number, expected in ((4, [1, 2, 4]), (5, [2, 4, 5]), (6, [4, 5, 6])):
        caplog.clear()
        outbox.put(attempt(number), b"plan", bytes(10))
        assert rounds(outbox) == expected
        (record,) = caplog.records
        assert record.levelno == logging.WARNING and "makes room" in record.message
        gone.append(record.message.rpartition("-")[0].rpartition("-")[2])
    assert gone == ["3", "1", "2"]
    assert not list(folder.glob("*.finished")), "nothing is left of that job"


def test_job_that_goes_on_is_no_longer_finished(folder: Path) -> None:
    outbox = Outbox(folder)
    outbox.finish(JOB)
    assert not list(folder.glob("*.finished")), "nothing of it is kept"
    outbox.put(attempt(1), b"plan", b"u")
    outbox.finish(JOB)
    assert [entry.finished for entry in Outbox(folder).entries()] == [True]
    outbox.put(attempt(2), b"plan", b"u")
    assert [entry.finished for entry in outbox.entries()] == [False, False]


def test_update_that_has_no_room_at_all_is_refused(folder: Path) -> None:
    outbox = Outbox(folder, max_bytes=HEAD + 10)
    outbox.put(attempt(1), b"plan", bytes(10))
    with pytest.raises(OutboxError, match=r"expected updates of at most 80 bytes, .* has 81"):
        outbox.put(attempt(2), b"plan", bytes(11))
    assert rounds(outbox) == [1]
    with pytest.raises(OutboxError, match="max_bytes: expected at least 1"):
        Outbox(folder, max_bytes=0)


# Damage


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "longer", "renamed"])
def test_broken_entry_is_set_aside_with_the_reason(
    folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    outbox = Outbox(folder)
    outbox.put(attempt(1), b"plan", b"whole")
    outbox.put(attempt(2), b"plan", b"broken")
    path = outbox.entries()[1].path
    blob = path.read_bytes()
    match damage:
        case "cut":
            path.write_bytes(blob[:-1])
        case "empty":
            path.write_bytes(b"")
        case "flipped":
            path.write_bytes(blob[:50] + bytes([blob[50] ^ 1]) + blob[51:])
        case "longer":
            path.write_bytes(blob + b"\0")
        case "renamed":  # the key is under the hash too
            path = path.rename(path.with_name(path.name.replace("-2-", "-3-")))
    asked = attempt(3 if damage == "renamed" else 2)
    assert outbox.get(asked, b"plan") is None
    assert outbox.get(attempt(1), b"plan") == b"whole"
    aside = {path.name: path for path in (folder / SET_ASIDE).iterdir()}
    assert aside.keys() == {path.name, f"{path.name}.reason"}
    reason = aside[f"{path.name}.reason"].read_text()
    assert "expected" in reason and "found" in reason
    assert "is set aside" in caplog.text
    outbox.put(asked, b"plan", b"again")
    assert outbox.get(asked, b"plan") == b"again"


def test_what_was_set_aside_is_the_first_to_make_room(folder: Path) -> None:
    outbox = Outbox(folder, max_bytes=600)
    for number in (1, 2, 3):
        outbox.put(attempt(number), b"plan", bytes(50))
    path = outbox.entries()[1].path
    path.write_bytes(path.read_bytes() + b"\0")
    assert outbox.get(attempt(2), b"plan") is None
    for number in (4, 5):
        outbox.put(attempt(number), b"plan", bytes(50))
    assert rounds(outbox) == [1, 3, 4, 5] and list((folder / SET_ASIDE).iterdir()) == []


def test_what_a_killed_writer_left_is_removed_and_foreign_names_are_set_aside(
    folder: Path,
) -> None:
    Outbox(folder).put(attempt(), b"plan", b"update")
    (folder / ".000000000002-x.update.0123abcd.partial").write_bytes(b"half")
    (folder / "note.update").write_bytes(b"mine?")
    assert rounds(Outbox(folder)) == [1]
    assert not list(folder.glob("*.partial"))
    assert (folder / SET_ASIDE / "note.update").read_bytes() == b"mine?"


def test_folder_that_cannot_be_used_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write_text("a file")
    with pytest.raises(OutboxError, match=r"outbox.*make room, or set the folder's owner right"):
        Outbox(folder)
    folder.unlink()
    outbox = Outbox(folder)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutboxError, match="No space left on device; make room"):
        outbox.put(attempt(), b"plan", b"update")
    monkeypatch.undo()
    assert sorted(path.name for path in folder.iterdir()) == ["lock"]
    outbox.put(attempt(), b"plan", b"update")


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(1, 6), st.sampled_from([JOB, OTHER])),
        st.tuples(st.just("acknowledge"), st.integers(1, 6), st.sampled_from([JOB, OTHER])),
        st.tuples(st.just("settle"), st.integers(1, 6), st.sampled_from([JOB, OTHER])),
        st.tuples(st.just("finish"), st.just(0), st.sampled_from([JOB, OTHER])),
    ),
    max_size=12,
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(operations=OPERATIONS)
def test_outbox_does_what_a_list_in_memory_would(
    operations: list[tuple[str, int, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("outbox")
    kept: list[tuple[str, int]] = []
    finished: set[str] = set()
    for operation, number, job in operations:
        outbox = Outbox(folder, max_bytes=3 * (HEAD + 1))  # opened again each time
        match operation:
            case "put":
                outbox.put(attempt(number, job=job), b"plan", b"u")
                if (job, number) not in kept:
                    if len(kept) == 3:
                        kept.remove(min(kept, key=lambda one: one[0] not in finished))
                    kept.append((job, number))
                    finished.discard(job)
            case "acknowledge":
                outbox.acknowledge(attempt(number, job=job))
                kept = [one for one in kept if one != (job, number)]
            case "settle":
                outbox.settle(job, before=number)
                kept = [one for one in kept if one[0] != job or one[1] >= number]
            case "finish":
                outbox.finish(job)
                finished |= {job} & {one[0] for one in kept}
        finished &= {one[0] for one in kept}
        found = outbox.entries()
        assert [(e.attempt.job, e.attempt.round) for e in found] == kept
        assert {e.attempt.job for e in found if e.finished} == finished


# Plans that are asked again

TENSORS = {"a": np.linspace(-1, 1, 40, dtype=np.float32)}
MANIFEST = Manifest(
    job=JOB,
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
    job=JOB,
    round=2,
    nonce="cd" * 16,
    client="c1",
    downlink_codec="float32",
    uplink_codec="int8",
    task="fit",
    learning_rate=0.5,
    local_epochs=3,
    seed=9,
    max_update_bytes=10_000,
    error_feedback=True,
)
DATA = {"labels": np.zeros(7, np.int64)}


class Counting:
    """A trainer that counts its rounds, and trains otherwise each time."""

    def __init__(self) -> None:
        self.times = 0

    def fit(self, tensors: Tensors, data: Tensors, **_: Any) -> tuple[Tensors, Mapping[str, float]]:
        self.times += 1
        change = np.float32(self.times)
        return {name: value + change for name, value in tensors.items()}, {"loss": 1.0}

    def evaluate(self, tensors: Tensors, data: Tensors, **_: Any) -> Mapping[str, float]:
        self.times += 1
        return {"accuracy": 0.5}

    def through(self, *lanes: object) -> Counting:
        return self


def blob_of(**changes: Any) -> bytes:
    return pack_plan(replace(PLAN, **changes), codec_named("float32").encode(TENSORS))


class Device:
    """What a process of a device does with plans, opened again for each as Flower does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trainer = Counting()

    def answer(self, plan: bytes) -> bytes:
        memory = FolderMemory(self.folder / "memory")
        return answer_once(
            plan,
            Outbox(self.folder / "outbox"),
            lambda blob: respond(
                blob,
                bundle_manifest=MANIFEST,
                initial=TENSORS,
                trainer=self.trainer,
                data_fit=DATA,
                data_held_out=DATA,
                client="c1",
                memory=memory,
            ),
        )


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path)


def test_plan_asked_again_is_answered_with_the_same_bytes_and_trained_once(device: Device) -> None:
    first = device.answer(blob_of())
    assert device.answer(blob_of()) == first
    assert device.trainer.times == 1
    # Another attempt of the round is other work, and from the same state as the first.
    assert device.answer(blob_of(nonce="ef" * 16)) != first
    assert device.trainer.times == 2
    assert device.answer(blob_of()) == first


def test_later_round_settles_the_earlier_ones_of_its_job(device: Device) -> None:
    outbox = Outbox(device.folder / "outbox")
    outbox.put(attempt(1, job=OTHER), b"plan", b"update")
    for number in (2, 3):
        device.answer(blob_of(round=number))
        assert [(e.attempt.job, e.attempt.round) for e in outbox.entries()] == [
            (OTHER, 1),
            (JOB, number),
        ]


def test_evaluations_are_not_kept(device: Device) -> None:
    plan = blob_of(task="evaluate", error_feedback=False)
    assert device.answer(plan) == device.answer(plan)
    assert device.trainer.times == 2
    assert Outbox(device.folder / "outbox").entries() == []


def test_plan_that_fails_leaves_nothing_and_may_be_asked_again(device: Device) -> None:
    with pytest.raises(PlanError, match="expected one for client c1"):
        device.answer(blob_of(client="c2"))
    with pytest.raises(PlanError, match="plan: container"):
        device.answer(blob_of()[:-1])
    assert Outbox(device.folder / "outbox").entries() == []
    device.answer(blob_of())
    with pytest.raises(OutboxError, match="asked with another plan before"):
        device.answer(blob_of(seed=10))
    assert device.trainer.times == 1


def test_broken_entry_is_trained_again(device: Device) -> None:
    first = device.answer(blob_of())
    device.trainer.times = 0
    (entry,) = Outbox(device.folder / "outbox").entries()
    entry.path.write_bytes(entry.path.read_bytes()[:-1])
    assert device.answer(blob_of()) == first, "the same training gives the same bits"
    assert device.trainer.times == 1


def test_update_is_sent_all_the_same_when_it_cannot_be_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outbox = Outbox(tmp_path, max_bytes=HEAD)
    assert answer_once(blob_of(), outbox, lambda _: b"update") == b"update"
    assert "is sent and not kept" in caplog.text and outbox.entries() == []


def test_faults_of_the_work_itself_pass_as_they_are(tmp_path: Path) -> None:
    def fail(_: bytes) -> bytes:
        raise OSError("the camera is gone")

    with pytest.raises(OSError, match="the camera is gone"):
        answer_once(blob_of(), Outbox(tmp_path), fail)


def test_split_session_is_not_opened_for_a_plan_that_was_answered(tmp_path: Path) -> None:
    from contextlib import contextmanager

    opened: list[str] = []
    plan = blob_of(error_feedback=False)

    @contextmanager
    def connect(plan: Plan) -> Any:
        opened.append(plan.nonce)
        yield ()

    def answer(blob: bytes) -> bytes:
        return respond_split(
            blob,
            bundle_manifest=MANIFEST,
            initial=TENSORS,
            trainer=Counting(),  # type: ignore[arg-type]
            connect=connect,
            data_fit=DATA,
            data_held_out={},
            client="c1",
        )

    answers = {answer_once(plan, Outbox(tmp_path), answer) for _ in range(3)}
    assert len(answers) == len(opened) == 1


def test_two_processes_that_get_the_same_plan_train_it_once(tmp_path: Path) -> None:
    trained: list[int] = []
    answers: list[bytes] = []

    def slow(_: bytes) -> bytes:
        trained.append(1)
        time.sleep(0.1)
        return b"update"

    # Locks of different opened files keep threads apart as they do processes.
    threads = [
        threading.Thread(
            target=lambda: answers.append(answer_once(blob_of(), Outbox(tmp_path), slow))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert answers == [b"update"] * 4 and len(trained) == 1


def test_flower_message_asked_again_is_answered_from_the_outbox(device: Device) -> None:
    pytest.importorskip("flwr")
    from flwr.app import Context, RecordDict, UserConfig
    from flwr.supercore.task_identity import TaskIdentity

    from client_sdk.client_app import Client, make_client_app
    from coordinator.flower_messages import wrapped
    from protocol import envelope

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    context = Context(
        run_id=1, node_id=2, node_config=UserConfig(), state=RecordDict(), run_config=UserConfig()
    )
    replies = []
    for _ in range(3):
        app = make_client_app(lambda _: Client(name="c1", answer=device.answer))
        reply = app(wrapped(2, "?", "train.fit", blob_of()), context)
        replies.append(envelope.read_content(reply.content))
    assert replies == [replies[0]] * 3 and device.trainer.times == 1
