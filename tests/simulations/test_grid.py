# SPDX-License-Identifier: Apache-2.0
"""The in-process Grid, under the server side's link: real Flower messages, no Flower processes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr")

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict, UserConfig
from flwr.app import Context as FlowerContext
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from coordinator.errors import NoClientsError
from coordinator.flower_link import FlowerLink
from coordinator.flower_messages import wrapped
from coordinator.link import Failure, Outgoing
from protocol import envelope
from protocol.readiness import Readiness, pack_readiness
from protocol.rejection import RejectionCode
from simulations.grid import InProcessGrid, Serve
from simulations.server_app import make_server_app

Asked = list[tuple[str, str, bytes]]
JOB = "ab" * 32
CLIENTS = ("c0", "c1", "c2", "c3", "c4")


def echo(asked: Asked) -> Iterator[tuple[str, bytes | Exception]]:
    for client, kind, blob in asked:
        yield client, kind.encode() + b":" + blob


def link_over(serve: Serve, **settings: Any) -> FlowerLink:
    return FlowerLink(InProcessGrid(CLIENTS, serve), clients=5, poll_s=0.001, **settings)


def outgoing(clients: Iterable[str] = CLIENTS, kind: str = "fit") -> list[Outgoing]:
    return [Outgoing(client, kind, client.encode()) for client in clients]


def test_every_client_is_known_by_name_and_answers() -> None:
    link = link_over(echo)
    assert link.survey(JOB) == dict.fromkeys(CLIENTS, Readiness())
    for kind in ("fit", "evaluate"):
        answers = dict(link.exchange(outgoing(kind=kind)))
        assert answers == {client: f"{kind}:{client}".encode() for client in CLIENTS}


def test_what_clients_say_of_themselves_is_heard() -> None:
    said = {"c1": pack_readiness(Readiness(samples=7, held_out=2))}
    grid = InProcessGrid(CLIENTS, echo, said)
    heard = dict(FlowerLink(grid, clients=5, poll_s=0.001).survey(JOB))
    assert heard.pop("c1") == Readiness(samples=7, held_out=2)
    assert heard == dict.fromkeys(("c0", "c2", "c3", "c4"), Readiness())


def test_all_messages_are_served_at_once_in_the_order_they_were_sent() -> None:
    batches: list[list[str]] = []

    def serve(asked: Asked) -> Iterator[tuple[str, bytes | Exception]]:
        batches.append([client for client, _, _ in asked])
        return echo(asked)

    list(link_over(serve).exchange(outgoing(["c3", "c1", "c4"])))
    assert batches == [["c3", "c1", "c4"]]


def test_no_more_messages_are_on_their_way_than_the_window_allows() -> None:
    batches: list[int] = []
    taken = 0

    def serve(asked: Asked) -> Iterator[tuple[str, bytes | Exception]]:
        batches.append(len(asked))
        assert taken <= sum(batches)
        return echo(asked)

    def lazily() -> Iterator[Outgoing]:
        nonlocal taken
        for message in outgoing():
            taken += 1
            yield message

    assert len(list(link_over(serve, window=2).exchange(lazily()))) == 5
    assert batches == [2, 2, 1]


def test_answers_come_while_others_are_still_at_work() -> None:
    finished: list[str] = []

    def serve(asked: Asked) -> Iterator[tuple[str, bytes | Exception]]:
        for client, _, blob in asked:
            finished.append(client)
            yield client, blob

    for client, _ in link_over(serve).exchange(outgoing()):
        assert finished[-1] == client


def test_nobody_works_any_more_once_an_exchange_is_closed() -> None:
    served: list[str] = []

    def serve(asked: Asked) -> Iterator[tuple[str, bytes | Exception]]:
        for client, _, blob in asked:
            served.append(client)
            yield client, blob

    link = link_over(serve)
    answers = list(link.exchange(outgoing(), closed=lambda: len(served) == 2))
    assert [client for client, _ in answers] == served == ["c0", "c1"]
    assert dict(link.exchange(outgoing(["c3", "c4"]))) == {"c3": b"c3", "c4": b"c4"}


def test_failure_is_a_value_when_a_client_raises_or_stays_silent() -> None:
    def serve(asked: Asked) -> Iterator[tuple[str, bytes | Exception]]:
        for client, _, blob in asked:
            if client == "c1":
                yield client, ValueError("no data")
            elif client != "c2":
                yield client, blob

    answers = dict(link_over(serve).exchange(outgoing()))
    failed = RejectionCode.CLIENT_FAILED
    assert answers["c1"] == Failure(code=failed, reason="ValueError: no data")
    assert answers["c2"] == Failure(
        code=failed, reason="RuntimeError: the simulated client gave no answer"
    )
    assert answers["c0"] == b"c0" and len(answers) == 5


def test_simulators_own_error_ends_the_run() -> None:
    def serve(asked: Asked) -> Iterator[tuple[str, bytes | Exception]]:
        raise MemoryError("cohort")

    with pytest.raises(MemoryError, match="cohort"):
        list(link_over(serve).exchange(outgoing()))


def test_unknown_client_is_a_failure() -> None:
    ((client, failure),) = link_over(echo).exchange(outgoing(["nobody"]))
    assert client == "nobody" and isinstance(failure, Failure)
    assert failure.code == RejectionCode.NO_REPLY


def test_two_messages_for_one_client_are_both_answered() -> None:
    answers = list(link_over(echo).exchange([*outgoing(["c1"]), *outgoing(["c1"], "evaluate")]))
    assert answers == [("c1", b"fit:c1"), ("c1", b"evaluate:c1")]


class MuteGrid(InProcessGrid):
    """Takes messages of work and never answers; drops some on the way."""

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        kept = [m for m in messages if m.metadata.dst_node_id != self.get_node_ids()[0]]
        return super().push_messages(kept)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        return iter(())


def test_silence_is_a_failure_after_the_timeout() -> None:
    link = link_over(echo, timeout_s=0.05)
    link._grid = MuteGrid(CLIENTS, echo)
    started = time.monotonic()
    answers = dict(link.exchange(outgoing(["c0", "c1"])))
    assert time.monotonic() - started < 5
    assert answers["c0"] == Failure(
        code=RejectionCode.NO_REPLY, reason="the message could not be sent"
    )
    assert answers["c1"] == Failure(
        code=RejectionCode.NO_REPLY, reason="expected an answer within 0.05 s, none came"
    )


def test_nobody_there_is_an_error_after_the_timeout() -> None:
    with pytest.raises(NoClientsError, match="expected 2 clients, none answered"):
        FlowerLink(InProcessGrid((), echo), clients=2, join_timeout_s=0.01)


def test_second_node_of_one_name_is_left_out_and_said_so(caplog: pytest.LogCaptureFixture) -> None:
    link = FlowerLink(InProcessGrid(("a", "b", "a"), echo), clients=3)
    assert sorted(link.survey(JOB)) == ["a", "b"]
    assert "there is a client a already" in caplog.text


class StrangeGrid(InProcessGrid):
    """Answers work with a content of its own."""

    content: RecordDict

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        for reply in super().pull_messages(message_ids):
            if reply.metadata.message_type != envelope.HELLO:
                reply.content = self.content
            yield reply


@pytest.mark.parametrize(
    "array",
    [
        Array(np.zeros(3, np.uint8)),
        Array("float32", (1,), envelope.ARRAY_TYPE, b"1234"),
        None,
    ],
)
def test_reply_of_another_form_is_a_failure(array: Array | None) -> None:
    grid = StrangeGrid(CLIENTS, echo)
    arrays = ArrayRecord({envelope.BLOB: array} if array else {})
    grid.content = RecordDict(
        {envelope.PAYLOAD: arrays, envelope.HEADER: ConfigRecord({envelope.CLIENT: "c0"})}
    )
    link = FlowerLink(grid, clients=5)
    ((_, failure),) = link.exchange(outgoing(["c0"]))
    assert isinstance(failure, Failure) and failure.code == RejectionCode.MALFORMED


def test_server_app_plays_over_the_grid() -> None:
    seen: list[Any] = []

    def play(link: FlowerLink) -> None:
        seen.extend(link.exchange(outgoing()))

    context = FlowerContext(
        run_id=1, node_id=1, node_config=UserConfig(), state=RecordDict(), run_config=UserConfig()
    )
    make_server_app(play, clients=5)(InProcessGrid(CLIENTS, echo), context)
    assert len(seen) == 5


def test_grid_keeps_nothing_when_everything_is_answered() -> None:
    grid = InProcessGrid(CLIENTS, echo)
    link = FlowerLink(grid, clients=5)
    list(link.exchange(outgoing()))
    assert not grid._pending
    assert list(grid.pull_messages(["message-1", "unknown"])) == []
    message = grid.create_message(RecordDict(), envelope.HELLO, grid.get_node_ids()[0], "")
    (reply,) = grid.send_and_receive([message])
    assert reply.metadata.reply_to_message_id == message.metadata.message_id


@pytest.mark.parametrize("blob", [b"", b"plan", bytes(range(256)) * 9_000])
def test_content_survives_flowers_own_transport(blob: bytes) -> None:
    # Over HTTP Flower takes a message apart into objects, and large arrays into chunks.
    link_over(echo)
    content = wrapped(2, "c1", "train.fit", blob).content
    objects = get_all_nested_objects(content)
    parts = {id_: part.deflate() for id_, part in objects.items()}
    again = inflate_object_from_contents(content.object_id, parts)
    assert envelope.read_content(again) == ("c1", blob)
