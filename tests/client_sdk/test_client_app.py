# SPDX-License-Identifier: Apache-2.0
"""The ClientApp, called as Flower calls it."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("flwr")

from flwr.app import Context, Message, RecordDict, UserConfig
from flwr.supercore.task_identity import TaskIdentity

from client_sdk.client_app import Client, NodeConfig, OpenClient, make_client_app
from coordinator.flower_messages import wrapped
from protocol import envelope


@pytest.fixture(autouse=True)
def identity() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


def open_client(node: NodeConfig) -> Client:
    def answer(blob: bytes) -> bytes:
        if blob == b"bad":
            raise ValueError("no such plan")
        return blob[::-1]

    return Client(name=f"c{node['partition-id']}", answer=answer)


def ask(kind: str, blob: bytes, partition: Any = 3, client: OpenClient = open_client) -> Message:
    context = Context(
        run_id=1,
        node_id=2,
        node_config=UserConfig({"partition-id": partition} if partition is not None else {}),
        state=RecordDict(),
        run_config=UserConfig(),
    )
    return make_client_app(client)(wrapped(2, "?", kind, blob), context)


@pytest.mark.parametrize("kind", ["train.fit", "evaluate.score"])
def test_plan_is_answered_with_the_clients_name(kind: str) -> None:
    reply = ask(kind, b"plan")
    assert reply.metadata.message_type == kind
    assert envelope.read_content(reply.content) == ("c3", b"nalp")


def test_hello_gives_the_name_and_does_no_work() -> None:
    assert envelope.read_content(ask(envelope.HELLO, b"bad").content) == ("c3", b"")


def test_a_clients_own_answer_to_a_hello_is_given_the_blob() -> None:
    def telling(node: NodeConfig) -> Client:
        return Client(name="c3", answer=bytes, survey=lambda blob: blob[::-1])

    reply = ask(envelope.HELLO, b"survey", client=telling)
    assert envelope.read_content(reply.content) == ("c3", b"yevrus")


@pytest.mark.parametrize(
    ("blob", "partition", "reason"),
    [(b"bad", 3, "ValueError: no such plan"), (b"plan", None, "KeyError: 'partition-id'")],
)
def test_error_is_the_reply_when_the_client_fails(
    blob: bytes, partition: int | None, reason: str
) -> None:
    reply = ask("train.fit", blob, partition)
    assert reply.has_error() and reply.error.reason == reason


def test_error_is_the_reply_when_the_message_is_not_ours() -> None:
    context = Context(
        run_id=1,
        node_id=2,
        node_config=UserConfig({"partition-id": 0}),
        state=RecordDict(),
        run_config=UserConfig(),
    )
    message = Message(RecordDict(), 2, "train.fit")
    reply = make_client_app(open_client)(message, context)
    assert "MalformedError: message: expected the records" in str(reply.error.reason)
