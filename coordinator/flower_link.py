# SPDX-License-Identifier: Apache-2.0
"""The server side of Flower: a `Link` over any Grid.

Differs from source: Flower's own `Strategy.start` waits for ever for nodes, keeps no state and ends
on one malformed reply; so the loop is ours, on `Grid.push_messages` and `pull_messages` alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Final

from flwr.app import Message
from flwr.serverapp import Grid

from coordinator.errors import NoClientsError
from coordinator.flower_messages import failure_of, readiness_of, wrapped
from coordinator.link import Failure, Outgoing, never
from coordinator.liveness import Liveness
from protocol import envelope
from protocol.errors import ContainerError
from protocol.readiness import Readiness, Survey, pack_survey
from protocol.rejection import RejectionCode

_JOIN_TIMEOUT_S: Final = 60.0  # Ray needs up to 20 s to start its workers on a busy machine
_FORGOTTEN_S: Final = 900.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Sent:
    """A message on its way."""

    key: str
    node: int
    at: float


@dataclass(slots=True)
class _Absent:
    """Nodes that an answer is waited for of, and that are not connected: since when."""

    at: float  # when that was looked at
    since: dict[int, float] = field(default_factory=dict)


@dataclass(slots=True)
class _Probes:
    """Questions about the messages of one exchange, by the questions' numbers."""

    liveness: Liveness
    about: dict[str, str] = field(default_factory=dict)


class FlowerLink:
    """A `Link` over any Flower Grid. Nodes have numbers in Flower and names in a job.

    In a simulation each node is asked for its name once, on construction: neither the Grid's order
    nor its NodeInfo says it. In a deployment the registry says who is who, so that nobody can
    answer for another, and each survey asks the nodes anew what they say of themselves, but for
    those that have just answered.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        clients: int = 0,
        names: Callable[[], Mapping[int, str]] | None = None,
        refused: Callable[[str], Failure | None] | None = None,
        tick: Callable[[], None] = lambda: None,
        split_port: int = 0,
        timeout_s: float = 0.0,
        survey_timeout_s: float = 60.0,
        gone_s: float = 300.0,
        fresh_s: float = 60.0,
        patience_s: float = 5.0,
        familiar_s: float = 20.0,
        look_s: float = 5.0,
        liveness: Callable[[], Liveness] = Liveness,
        window: int = 0,
        poll_s: float = 0.02,
        join_timeout_s: float = _JOIN_TIMEOUT_S,
    ) -> None:
        """For a simulation: wait for `clients` nodes, then learn their names.

        Args:
            clients: nodes to wait for, at most `join_timeout_s` seconds.
            names: for a deployment: the device of each node that may take part, connected or not;
                asked at each survey, and then nobody is waited for here.
            refused: see `Link.refused`; None: whoever `names` has not got any more.
            tick: called at each poll of whatever waits; what it raises ends the run.
            split_port: told in surveys, see `Survey`.
            timeout_s: seconds a client may take to answer; 0: no limit.
            survey_timeout_s: seconds that nodes have to answer a survey.
            gone_s: with `names`: seconds without a connection after which no answer is waited for
                any more, whatever `timeout_s` says.
            fresh_s, patience_s, familiar_s: see `survey`; the second is how long those are waited
                for that owe an answer, after the others have said what they are, the third how
                long those that have answered a survey before.
            look_s: with `names`: seconds between two looks at who is connected.
            liveness: of an exchange, when to ask devices whether they are at work at all.
            window: most messages on their way at a time, which bounds memory; 0: no limit.
            poll_s: seconds between two looks for answers.

        Raises: NoClientsError, when not one node came or told its name, without `names`.
        """
        self._grid = grid
        self._registered = names
        self._refused = refused
        self._tick = tick
        self._split_port = split_port
        self._timeout_s = timeout_s
        self._survey_timeout_s = survey_timeout_s
        self._gone_s = gone_s
        self._fresh_s = fresh_s
        self._patience_s = patience_s
        self._familiar_s = familiar_s
        self._look_s = look_s
        self._liveness = liveness
        self._window = window
        self._poll_s = poll_s
        self._nodes: dict[str, int] = {}
        self._said: dict[str, Readiness] = {}
        self._heard: dict[str, tuple[float, Readiness]] = {}
        self._familiar: set[str] = set()
        self._job = ""
        self._online: frozenset[int] = frozenset()
        self._owed: dict[str, _Sent] = {}
        self._open: list[dict[str, _Sent]] = []
        if names is None:
            nodes = self._wait_for_nodes(clients, join_timeout_s)
            self._learn_names(nodes, join_timeout_s)
            if not self._nodes:
                raise NoClientsError(
                    f"expected {clients} clients, none answered within {join_timeout_s:g} s; "
                    "see that devices are running and can reach the coordinator"
                )

    def survey(self, job: str) -> Mapping[str, Readiness]:
        """See `Link.survey`.

        In a deployment whoever owes an answer is at work, unless it says that it is not, and is
        hardly waited for: a slow device holds up nobody. Who has said that it is ready, or done
        what it was asked, in the last `fresh_s` seconds is not asked again: a question takes a
        device's SuperNode several seconds. Who has answered before has the job's bundle and
        answers soon, or has died, which SuperLink finds out much later; the first answer has
        `survey_timeout_s`.
        """
        if self._registered is None:
            return dict(self._said)
        self._job = job
        self._online = frozenset(self._grid.get_node_ids())
        self._nodes = _by_name(self._registered(), self._online)
        self._hear_the_late()
        in_exchange = {sent.node for sents in self._open for sent in sents.values()}
        owing = {sent.node for sent in self._owed.values()}
        fresh = time.monotonic() - self._fresh_s
        busy = Readiness(ready=False, reason="it is still at work on what it was asked before")
        said: dict[str, Readiness] = {}
        asked: dict[str, int] = {}
        for client, node in self._nodes.items():
            at, before = self._heard.get(client, (0.0, busy))
            if node not in self._online:
                said[client] = Readiness(ready=False, reason="it is not connected")
            elif node in in_exchange:
                said[client] = busy
            elif node not in owing and at > fresh and before.ready:
                said[client] = before
            else:
                asked[client] = node
        owing_clients = {client for client, node in asked.items() if node in owing}
        said.update(self._ask(asked, hardly=owing_clients))
        for client in owing_clients:
            readiness = said.setdefault(client, busy)
            if readiness.working is False:
                self._owed = {
                    key: sent for key, sent in self._owed.items() if sent.node != asked[client]
                }
            else:
                said[client] = busy
        return said

    def _ask(self, asked: Mapping[str, int], *, hardly: Collection[str]) -> dict[str, Readiness]:
        """What these say; those of `hardly` only if they say it soon after the others."""
        said: dict[str, Readiness] = {}
        others = set(asked) - set(hardly)
        soon = time.monotonic() + self._familiar_s
        patience: list[float] = []

        def closed() -> bool:
            silent = others - set(said)
            now = time.monotonic()
            if silent - self._familiar or (silent and now < soon):
                return False
            patience.append(now + self._patience_s)
            return now > patience[0] or set(asked) <= set(said)

        hellos = ((client, node, self._hello(client, node)) for client, node in asked.items())
        with closing(self._converse(hellos, self._survey_timeout_s, closed)) as arriving:
            for client, reply in arriving:
                said[client] = self._hear(client, reply)
        silent = Readiness(ready=False, reason="it has not answered yet")
        return dict.fromkeys(others, silent) | said

    def _hear(self, client: str, reply: Message | Failure) -> Readiness:
        """What a device says of itself."""
        readiness = readiness_of(reply)
        self._heard[client] = (time.monotonic(), readiness)
        if not isinstance(reply, Failure):
            self._familiar.add(client)
        return readiness

    def _hello(self, client: str, node: int) -> Message:
        blob = pack_survey(Survey(job=self._job, split_port=self._split_port))
        return wrapped(node, client, envelope.HELLO, blob)

    def exchange(
        self, outgoing: Iterable[Outgoing | None], *, closed: Callable[[], bool] = never
    ) -> Generator[tuple[str, bytes | Failure]]:
        """See `Link.exchange`. A client's error, silence or nonsense is a `Failure`."""
        messages = (self._addressed(message) for message in outgoing)
        probes = _Probes(self._liveness()) if self._registered is not None else None
        with closing(self._converse(messages, self._timeout_s, closed, probes)) as arriving:
            for client, reply in arriving:
                answer: bytes | Failure
                if isinstance(reply, Failure):
                    answer = reply
                else:
                    try:
                        _, answer = envelope.read_content(reply.content)
                    except ContainerError as error:
                        answer = Failure(code=error.code, reason=str(error))
                _, said = self._heard.pop(client, (0.0, None))
                if said is not None and not isinstance(answer, Failure):
                    self._heard[client] = (time.monotonic(), said)
                yield client, answer

    def refused(self, client: str) -> Failure | None:
        """See `Link.refused`."""
        if self._refused is not None:
            return self._refused(client)
        if self._registered is None or client in self._registered().values():
            return None
        reason = "the device was revoked, or left, after it was asked"
        return Failure(code=RejectionCode.REVOKED, reason=reason)

    def pause(self, seconds: float) -> None:
        """Sleep, with a tick at each poll, until a device connects that was away."""
        now = time.monotonic()
        until, look = now + seconds, now + self._look_s
        while (left := until - now) > 0:
            self._tick()
            if self._registered is not None and now > look:
                if not self._online.issuperset(self._grid.get_node_ids()):
                    break
                look = now + self._look_s
            time.sleep(min(self._poll_s, left))
            now = time.monotonic()
        self._tick()

    def _learn_names(self, nodes: Iterable[int], timeout_s: float) -> None:
        hellos = (
            (str(node), node, wrapped(node, str(node), envelope.HELLO, b"")) for node in nodes
        )
        for node, reply in self._converse(hellos, timeout_s):
            if isinstance(reply, Failure):
                _log.warning("node %s is left out: %s", node, reply.reason)
                continue
            try:
                name, _ = envelope.read_content(reply.content)
            except ContainerError as error:
                _log.warning("node %s is left out: %s", node, error)
                continue
            if name in self._nodes:
                _log.warning("node %s is left out: there is a client %s already", node, name)
                continue
            self._nodes[name] = int(node)
            self._said[name] = readiness_of(reply)

    def _wait_for_nodes(self, clients: int, timeout_s: float) -> list[int]:
        deadline = time.monotonic() + timeout_s
        while (
            len(nodes := sorted(self._grid.get_node_ids())) < clients
            and time.monotonic() < deadline
        ):
            self.pause(self._poll_s)
        return nodes

    def _hear_the_late(self) -> None:
        """Take note of answers that come too late to be used: those nodes are free again. What they
        say of themselves is of use.

        A message to a node that is gone, or is not heard of for long, will not be answered.
        """
        for reply in self._grid.pull_messages(list(self._owed)) if self._owed else ():
            sent = self._owed.pop(reply.metadata.reply_to_message_id, None)
            is_hello = reply.metadata.message_type == envelope.HELLO
            if sent is not None and is_hello and failure_of(reply, sent.node) is None:
                self._hear(sent.key, reply)
        oldest = time.monotonic() - max(_FORGOTTEN_S, self._timeout_s)
        self._owed = {
            message_id: sent
            for message_id, sent in self._owed.items()
            if sent.node in self._online and sent.at > oldest
        }

    def _addressed(self, message: Outgoing | None) -> tuple[str, int, Message | Failure] | None:
        if message is None:
            return None
        client, kind, blob = message
        node = self._nodes.get(client)
        reason = "no node is known for this client" if node is None else ""
        if self._registered is not None and node is not None and node not in self._online:
            reason = "it is not connected"
        if node is None or reason:
            return client, 0, Failure(code=RejectionCode.NO_REPLY, reason=reason)
        return client, node, wrapped(node, client, envelope.MESSAGE_TYPES[kind], blob)

    def _converse(
        self,
        messages: Iterator[tuple[str, int, Message | Failure] | None],
        timeout_s: float,
        closed: Callable[[], bool] = never,
        probes: _Probes | None = None,
    ) -> Generator[tuple[str, Message | Failure]]:
        """Push messages as the window allows, and give each one's reply, keyed as it was.

        With `probes` those that are slow are asked whether they are at work at all.
        """
        waiting: dict[str, _Sent] = {}
        exhausted = False
        self._open.append(waiting)
        absent = _Absent(at=time.monotonic())
        try:
            while (waiting or not exhausted) and not closed():
                self._tick()
                while not exhausted and not (self._window and len(waiting) >= self._window):
                    following = next(messages, _END)
                    if following is None:
                        break
                    key, node, message = following
                    if message is None:
                        exhausted = True
                    elif isinstance(message, Failure):
                        yield key, message
                    # One push a message: a Grid that cannot take one of many does not say which.
                    elif message_id := next(iter(self._grid.push_messages([message])), None):
                        waiting[message_id] = _Sent(key, node, time.monotonic())
                    else:
                        reason = "the message could not be sent"
                        yield key, Failure(code=RejectionCode.NO_REPLY, reason=reason)
                heard = False
                for sent, reply in self._replies(waiting):
                    heard = True
                    yield sent.key, failure_of(reply, sent.node) or reply
                    if self._registered is None and closed():
                        return  # the next reply has yet to be worked for
                if probes is not None:
                    self._probe(waiting, probes)
                for message_id, failure in self._given_up(waiting, timeout_s, absent, probes):
                    sent = self._owed[message_id] = waiting.pop(message_id)
                    yield sent.key, failure
                if not heard and (waiting or not exhausted):
                    time.sleep(self._poll_s)
        finally:
            self._open = [other for other in self._open if other is not waiting]
            self._owed.update(waiting)

    def _probe(self, waiting: Mapping[str, _Sent], probes: _Probes) -> None:
        """Ask those that are due whether they are at work, and hear what others said."""
        now = time.monotonic()
        for message_id in probes.liveness.due(waiting, now):
            sent = waiting[message_id]
            hello = self._hello(sent.key, sent.node)
            for question in self._grid.push_messages([hello]):
                probes.about[question] = message_id
        if not probes.about:
            return
        for reply in self._grid.pull_messages(list(probes.about)):
            about = probes.about.pop(reply.metadata.reply_to_message_id, "")
            # Of an error nothing is known: another question follows.
            working = None if reply.has_error() else readiness_of(reply).working
            probes.liveness.told(about, working, now)

    def _given_up(
        self,
        waiting: Mapping[str, _Sent],
        timeout_s: float,
        absent: _Absent,
        probes: _Probes | None,
    ) -> list[tuple[str, Failure]]:
        """Messages whose answers are waited for no longer, and why."""
        now = time.monotonic()
        found: dict[str, Failure] = {}
        if self._registered is not None and now - absent.at > min(self._look_s, self._gone_s / 2):
            online = frozenset(self._grid.get_node_ids())
            absent.at = now
            absent.since = {
                sent.node: absent.since.get(sent.node, now)
                for sent in waiting.values()
                if sent.node not in online
            }
            found = {key: no for key, sent in waiting.items() if (no := self.refused(sent.key))}
        lost = frozenset(probes.liveness.lost(now)) if probes is not None else frozenset()
        for message_id, sent in waiting.items():
            reason = ""
            if now - sent.at > timeout_s > 0:
                reason = f"expected an answer within {timeout_s:g} s, none came"
            elif now - absent.since.get(sent.node, now) > self._gone_s:
                reason = f"it has not been connected for {self._gone_s:g} s"
            elif message_id in lost:
                reason = "it is not at work on it any more; it was restarted, it seems"
            if reason:
                found[message_id] = Failure(code=RejectionCode.NO_REPLY, reason=reason)
        return list(found.items())

    def _replies(self, waiting: dict[str, _Sent]) -> Iterator[tuple[_Sent, Message]]:
        """What has come for those that wait, who wait no longer."""
        replies = self._grid.pull_messages(list(waiting))
        matched = (
            (sent, reply)
            for reply in replies
            if (sent := waiting.pop(reply.metadata.reply_to_message_id, None)) is not None
        )
        # In a simulation a client works when its reply is asked for. Elsewhere they are fetched
        # together, and an exchange that is closed among them must not wait for the rest again.
        return matched if self._registered is None else iter(list(matched))


_END: Final[tuple[str, int, None]] = ("", 0, None)


def _by_name(registered: Mapping[int, str], online: frozenset[int]) -> dict[str, int]:
    """One node a device: of several that the registry has, one that is connected."""
    found: dict[str, int] = {}
    for node, name in sorted(registered.items(), key=lambda item: item[0] not in online):
        if name in found:
            _log.warning("node %s is left out: %s is node %s", node, name, found[name])
        else:
            found[name] = node
    return dict(sorted(found.items()))
