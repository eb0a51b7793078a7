# SPDX-License-Identifier: Apache-2.0
"""The link of a deployment: the registry says who is who, and nobody holds up the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("flwr")

from flwr.app import Message

from client_sdk.client_app import make_reply
from coordinator.flower_link import FlowerLink
from coordinator.link import Failure, Outgoing
from coordinator.liveness import Liveness
from protocol import envelope
from protocol.readiness import Readiness, Survey, pack_readiness, unpack_survey
from protocol.rejection import RejectionCode
from simulations.grid import InProcessGrid

JOB = "ab" * 32
NODES = {2: "press-1", 3: "press-2", 4: "lathe"}
SAYS = Readiness(samples=40, held_out=8, free_memory_mb=900, clock=12.5)


class Devices(InProcessGrid):
    """Nodes 2, 3, ... that answer when `ready` says so, under whatever name they claim."""

    def __init__(self, count: int = 3) -> None:
        super().__init__([f"claims-{n}" for n in range(count)], lambda asked: ())
        self.online = set(self._names)
        self.ready: Callable[[Message], bool] = lambda message: True
        self.says: dict[int, bytes] = {}
        self.fails: set[int] = set()  # at plans
        self.pushed: list[Message] = []
        self.asked: list[tuple[int, Survey]] = []

    def get_node_ids(self) -> list[int]:
        return sorted(self.online)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        self.pushed.extend(kept := list(messages))
        return super().push_messages(kept)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        for message_id in [id_ for id_ in message_ids if id_ in self._pending]:
            message = self._pending[message_id]
            node = message.metadata.dst_node_id
            if node not in self.online or not self.ready(message):
                continue
            del self._pending[message_id]
            _, blob = envelope.read_content(message.content)
            if message.metadata.message_type == envelope.HELLO:
                self.asked.append((node, unpack_survey(blob)))
                blob = self.says.get(node, pack_readiness(SAYS))
            failed = node in self.fails and not is_hello(message)
            yield make_reply(message, "press-1", RuntimeError("hot") if failed else blob)


def link_of(grid: Devices, **options: Any) -> FlowerLink:
    settings = {
        "names": lambda: NODES, "poll_s": 0.001, "survey_timeout_s": 0.05, "fresh_s": 0.0,
        "patience_s": 0.02, **options,
    }  # fmt: skip
    return FlowerLink(grid, **settings)


def is_hello(message: Message) -> bool:
    return message.metadata.message_type == envelope.HELLO


def test_a_survey_asks_all_that_are_connected_and_names_them_by_the_registry() -> None:
    grid = Devices()
    link = link_of(grid, split_port=9_443)
    # All three claim to be press-1; nobody is asked for a name.
    assert link.survey(JOB) == dict.fromkeys(("lathe", "press-1", "press-2"), SAYS)
    assert sorted(grid.asked) == [(n, Survey(job=JOB, split_port=9_443)) for n in (2, 3, 4)]
    outgoing = [Outgoing("lathe", "fit", b"for the lathe")]
    assert list(link.exchange(outgoing)) == [("lathe", b"for the lathe")]
    assert grid.pushed[-1].metadata.dst_node_id == 4


def test_a_node_that_the_registry_does_not_know_is_not_asked() -> None:
    grid = Devices(5)
    assert sorted(link_of(grid).survey(JOB)) == ["lathe", "press-1", "press-2"]
    assert sorted({node for node, _ in grid.asked}) == [2, 3, 4]


def test_who_is_away_or_answers_nonsense_is_not_ready_and_holds_up_nobody() -> None:
    grid = Devices()
    grid.online = {3, 4}
    grid.says = {3: b"{", 4: b""}
    said = link_of(grid).survey(JOB)
    assert said["press-1"] == Readiness(ready=False, reason="it is not connected")
    assert not said["press-2"].ready and "its answer cannot be read" in said["press-2"].reason
    assert said["lathe"] == Readiness()


def test_names_are_asked_afresh_and_of_two_nodes_the_connected_one_counts() -> None:
    grid = Devices()
    names = dict(NODES)
    link = link_of(grid, names=lambda: names)
    link.survey(JOB)
    del names[2]
    names[3] = "press-1"
    names[9] = "press-1"
    assert sorted(link.survey(JOB)) == ["lathe", "press-1"]
    list(link.exchange([Outgoing("press-1", "fit", b"x")]))
    assert grid.pushed[-1].metadata.dst_node_id == 3
    gone = link.refused("press-2")
    assert gone is not None and gone.code == RejectionCode.REVOKED
    assert link.refused("press-1") is None and link.refused("lathe") is None
    asked = link_of(grid, refused=lambda client: gone if client == "lathe" else None)
    assert asked.refused("lathe") == gone and asked.refused("press-2") is None
    ((_, failure),) = link.exchange([Outgoing("press-2", "fit", b"x")])
    assert failure == Failure(
        code=RejectionCode.NO_REPLY, reason="no node is known for this client"
    )


def test_whoever_does_not_answer_a_survey_in_time_is_at_work_until_it_does() -> None:
    grid = Devices()
    link = link_of(grid)
    grid.ready = lambda message: message.metadata.dst_node_id != 3
    said = link.survey(JOB)
    assert said["press-2"] == Readiness(
        ready=False, reason="expected an answer within 0.05 s, none came"
    )
    started = time.monotonic()
    link._survey_timeout_s = 60.0
    assert "still at work" in link.survey(JOB)["press-2"].reason
    assert time.monotonic() - started < 30, "hardly anybody waits for it a second time"
    grid.ready = lambda message: True
    assert link.survey(JOB)["press-2"] == SAYS


def test_a_device_left_behind_by_a_closed_exchange_is_at_work_until_its_late_answer() -> None:
    grid = Devices()
    link = link_of(grid)
    link.survey(JOB)
    grid.ready = lambda message: is_hello(message) or message.metadata.dst_node_id != 4
    polls = iter([False] * 5 + [True] * 9)
    outgoing = [Outgoing(name, "fit", b"plan") for name in ("lathe", "press-1", "press-2")]
    answers = list(link.exchange(outgoing, closed=lambda: next(polls)))
    assert [client for client, _ in answers] == ["press-1", "press-2"]
    said = link.survey(JOB)
    assert [name for name in said if not said[name].ready] == ["lathe"]
    # A device that has lost its connection has lost the plan as well.
    grid.online.remove(4)
    assert link.survey(JOB)["lathe"].reason == "it is not connected"
    grid.online.add(4)
    assert link.survey(JOB)["lathe"] == SAYS


def test_answers_that_came_together_with_the_last_one_are_not_waited_for_again() -> None:
    grid = Devices()
    link = link_of(grid)
    link.survey(JOB)
    outgoing = [Outgoing(name, "fit", b"plan") for name in ("lathe", "press-1", "press-2")]
    answers = link.exchange(outgoing)
    next(answers)
    answers.close()
    assert all(readiness.ready for readiness in link.survey(JOB).values())


def test_a_device_that_is_gone_for_long_is_not_waited_for() -> None:
    grid = Devices()
    link = link_of(grid, gone_s=0.1)
    link.survey(JOB)
    answers = link.exchange([Outgoing(name, "fit", b"plan") for name in ("press-1", "lathe")])
    assert next(answers)[0] == "press-1"
    grid.online = {2, 3}
    grid.ready = lambda message: message.metadata.dst_node_id != 4
    answers = link.exchange([Outgoing(name, "fit", b"plan") for name in ("press-1", "lathe")])
    found = dict(answers)
    assert found["press-1"] == b"plan"
    reason = "it has not been connected for 0.1 s"
    assert found["lathe"] == Failure(code=RejectionCode.NO_REPLY, reason=reason)
    link.survey(JOB)
    ((_, failure),) = link.exchange([Outgoing("lathe", "fit", b"plan")])
    assert failure == Failure(code=RejectionCode.NO_REPLY, reason="it is not connected")


def test_an_answer_that_another_node_sent_is_a_failure() -> None:
    class Forging(Devices):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
            for reply in super().pull_messages(message_ids):
                if not is_hello(reply):
                    reply.metadata.__dict__["_src_node_id"] = 4
                yield reply

    link = link_of(Forging())
    link.survey(JOB)
    ((client, failure),) = link.exchange([Outgoing("press-1", "fit", b"x")])
    assert client == "press-1" and isinstance(failure, Failure)
    assert failure.code == RejectionCode.WRONG_CLIENT


@pytest.mark.parametrize("waiting", ["survey", "exchange", "pause"])
def test_the_operator_s_stop_ends_whatever_waits(waiting: str) -> None:
    grid = Devices()
    ticks = 0

    class StopError(Exception):
        pass

    def tick() -> None:
        nonlocal ticks
        ticks += 1
        if ticks > 20:
            raise StopError

    link = link_of(grid, tick=tick, survey_timeout_s=60.0)
    link.survey(JOB)
    grid.ready = lambda message: False
    with pytest.raises(StopError):
        match waiting:
            case "survey":
                link.survey(JOB)
            case "exchange":
                list(link.exchange([Outgoing("lathe", "fit", b"x")]))
            case _:
                link.pause(60)


def test_a_survey_in_the_midst_of_an_exchange_asks_only_those_that_are_free() -> None:
    grid = Devices()
    link = link_of(grid)
    link.survey(JOB)
    grid.ready = lambda message: is_hello(message) or message.metadata.dst_node_id != 4
    outgoing = [Outgoing(name, "fit", b"plan") for name in ("lathe", "press-1")]
    answers = link.exchange(outgoing)
    assert next(answers) == ("press-1", b"plan")
    said = link.survey(JOB)
    assert [name for name in said if not said[name].ready] == ["lathe"]
    grid.ready = lambda message: True
    assert list(answers) == [("lathe", b"plan")], "and takes nobody's answer away"
    assert link.survey(JOB)["lathe"] == SAYS


def test_nothing_to_send_just_now_is_asked_for_again() -> None:
    link = link_of(Devices())
    link.survey(JOB)
    heard: list[str] = []

    def outgoing() -> Iterator[Outgoing | None]:
        yield Outgoing("lathe", "fit", b"1")
        while not heard:
            yield None
        yield Outgoing("press-1", "fit", b"2")

    for client, _ in link.exchange(outgoing()):
        heard.append(client)
    assert heard == ["lathe", "press-1"]


def test_whoever_has_just_answered_is_not_asked_again() -> None:
    grid = Devices()
    link = link_of(grid, fresh_s=60.0)
    link.survey(JOB)
    grid.asked.clear()
    assert link.survey(JOB) == dict.fromkeys(("lathe", "press-1", "press-2"), SAYS)
    assert not grid.asked
    grid.says = {4: pack_readiness(Readiness(ready=False, reason="hot", samples=3))}
    # What failed is asked again, and so is who was not ready.
    grid.fails = {4}
    ((_, failure),) = link.exchange([Outgoing("lathe", "fit", b"x")])
    assert isinstance(failure, Failure)
    assert link.survey(JOB)["lathe"].reason == "hot"
    assert [node for node, _ in grid.asked] == [4]
    assert link.survey(JOB)["lathe"].reason == "hot"
    assert [node for node, _ in grid.asked] == [4, 4]


@pytest.mark.parametrize(("working", "ready"), [(True, False), (None, False), (False, True)])
def test_who_owes_an_answer_is_free_once_it_says_that_it_is_at_work_on_nothing(
    working: bool | None, ready: bool
) -> None:
    grid = Devices()
    link = link_of(grid, patience_s=5.0)
    link.survey(JOB)
    grid.ready = is_hello
    polls = iter([False] * 5 + [True] * 99)
    assert not list(link.exchange([Outgoing("lathe", "fit", b"x")], closed=lambda: next(polls)))
    grid.says = {4: pack_readiness(replace(SAYS, working=working))}
    said = link.survey(JOB)["lathe"]
    assert said.ready == ready and ("still at work" in said.reason) == (not ready)


def test_a_device_that_was_restarted_in_its_work_is_given_up() -> None:
    grid = Devices()
    link = link_of(grid, liveness=lambda: Liveness(first_s=0.01, growth=1.0, grace_s=0.05))
    link.survey(JOB)
    grid.ready = is_hello
    grid.says = {
        2: pack_readiness(replace(SAYS, working=True)),
        3: pack_readiness(replace(SAYS, working=False)),
    }
    answers = link.exchange([Outgoing(name, "fit", b"x") for name in ("press-1", "press-2")])
    client, failure = next(answers)
    assert client == "press-2" and isinstance(failure, Failure)
    assert failure.code == RejectionCode.NO_REPLY and "it was restarted" in failure.reason
    grid.ready = lambda message: True
    assert list(answers) == [("press-1", b"x")], "who is at work is waited for"
    assert link.survey(JOB)["press-2"].ready


def test_a_revoked_device_is_not_waited_for() -> None:
    grid = Devices()
    names = dict(NODES)
    link = link_of(grid, names=lambda: names, gone_s=0.02)
    link.survey(JOB)
    grid.ready = lambda message: message.metadata.dst_node_id != 4
    answers = link.exchange([Outgoing(name, "fit", b"x") for name in ("lathe", "press-1")])
    assert next(answers) == ("press-1", b"x")
    del names[4]
    ((client, failure),) = answers
    assert client == "lathe" and isinstance(failure, Failure)
    assert failure.code == RejectionCode.REVOKED


def test_superlinks_word_that_a_node_is_gone_is_no_answer_of_another() -> None:
    class GivingUp(Devices):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
            for reply in super().pull_messages(message_ids):
                if not is_hello(reply):
                    reply.metadata.__dict__["_src_node_id"] = 1
                yield reply

    grid = GivingUp()
    grid.fails = {4}
    link = link_of(grid)
    link.survey(JOB)
    ((_, failure),) = link.exchange([Outgoing("lathe", "fit", b"x")])
    assert isinstance(failure, Failure) and failure.code == RejectionCode.NO_REPLY
    assert "SuperLink gave it up" in failure.reason
    ((_, forged),) = link.exchange([Outgoing("press-1", "fit", b"x")])
    assert isinstance(forged, Failure) and forged.code == RejectionCode.WRONG_CLIENT


def test_a_device_that_answered_before_and_is_silent_holds_up_nobody() -> None:
    grid = Devices()
    link = link_of(grid, survey_timeout_s=60.0, familiar_s=0.05)
    link.survey(JOB)
    # It was killed a moment ago: SuperLink believes it connected for a while yet.
    grid.ready = lambda message: message.metadata.dst_node_id != 3
    started = time.monotonic()
    said = link.survey(JOB)
    assert time.monotonic() - started < 30
    assert said["press-2"] == Readiness(ready=False, reason="it has not answered yet")
    assert said["lathe"] == said["press-1"] == SAYS


def test_a_device_that_never_answered_may_be_fetching_its_bundle() -> None:
    grid = Devices()
    grid.online = {2, 3}
    link = link_of(grid, survey_timeout_s=60.0, familiar_s=0.0)
    link.survey(JOB)
    grid.online.add(4)
    polls = iter(range(100))
    grid.ready = lambda message: message.metadata.dst_node_id != 4 or next(polls) > 20
    assert link.survey(JOB)["lathe"] == SAYS


def test_what_a_device_says_late_counts_in_the_next_survey() -> None:
    grid = Devices()
    link = link_of(grid, familiar_s=0.0, fresh_s=60.0)
    grid.ready = lambda message: message.metadata.dst_node_id != 3
    assert not link.survey(JOB)["press-2"].ready
    grid.asked.clear()
    grid.ready = lambda message: True
    assert link.survey(JOB)["press-2"] == SAYS
    assert grid.asked == [(3, Survey(job=JOB))], "it was asked once"


def test_a_pause_ends_when_a_device_connects() -> None:
    grid = Devices()
    grid.online = {2, 3}
    looks = 0

    def tick() -> None:
        nonlocal looks
        looks += 1
        if looks > 20:
            grid.online.add(4)

    link = link_of(grid, tick=tick, look_s=0.01)
    link.survey(JOB)
    started = time.monotonic()
    link.pause(120)
    assert time.monotonic() - started < 60
