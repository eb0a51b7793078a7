# SPDX-License-Identifier: Apache-2.0
"""The server side of Flower: a `Link` over a Grid, and the ServerApp that plays a job on it.

Differs from source: Flower's own `Strategy.start` waits for ever for nodes, keeps no state and ends
on one malformed reply; so the loop is ours, on `Grid.push_messages` and `pull_messages` alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Final

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from coordinator.errors import NoClientsError
from coordinator.link import Failure, Outgoing
from protocol import envelope
from protocol.errors import ContainerError
from protocol.rejection import RejectionCode

_JOIN_TIMEOUT_S: Final = 60.0  # Ray needs up to 20 s to start its workers on a busy machine

_log = logging.getLogger(__name__)


class FlowerLink:
    """A `Link` over any Flower Grid.

    Nodes have numbers in Flower and names in a job. Who is who is asked once, on construction, with
    a message to every node: neither the Grid's order nor its NodeInfo says it.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        clients: int,
        timeout_s: float = 0.0,
        window: int = 0,
        poll_s: float = 0.02,
        join_timeout_s: float = _JOIN_TIMEOUT_S,
    ) -> None:
        """Wait for `clients` nodes, then learn their names.

        Args:
            clients: nodes to wait for, at most `join_timeout_s` seconds.
            timeout_s: seconds a client may take to answer; 0: no limit.
            window: most messages on their way at a time, which bounds memory; 0: no limit.
            poll_s: seconds between two looks for answers.

        Raises: NoClientsError, when not one node came or told its name.
        """
        self._grid = grid
        self._timeout_s = timeout_s
        self._window = window
        self._poll_s = poll_s
        nodes = _wait_for_nodes(grid, clients, join_timeout_s, poll_s)
        self._nodes = self._learn_names(nodes, join_timeout_s)
        if not self._nodes:
            raise NoClientsError(
                f"expected {clients} clients, none answered within {join_timeout_s:g} s; "
                "see that devices are running and can reach the coordinator"
            )

    def node_ids(self) -> Sequence[str]:
        """The clients' names, sorted."""
        return tuple(sorted(self._nodes))

    def exchange(self, outgoing: Iterable[Outgoing]) -> Generator[tuple[str, bytes | Failure]]:
        """See `Link.exchange`. A client's error, silence or nonsense is a `Failure`."""
        messages = (
            (client, self._message(client, envelope.MESSAGE_TYPES[kind], blob))
            for client, kind, blob in outgoing
        )
        for client, reply in self._converse(messages, self._timeout_s):
            if isinstance(reply, Failure):
                yield client, reply
                continue
            try:
                yield client, envelope.read_content(reply.content)[1]
            except ContainerError as error:
                yield client, Failure(code=error.code, reason=str(error))

    def _learn_names(self, nodes: Iterable[int], timeout_s: float) -> dict[str, int]:
        names: dict[str, int] = {}
        hellos = ((str(node), _wrap(node, str(node), envelope.HELLO, b"")) for node in nodes)
        for node, reply in self._converse(hellos, timeout_s):
            if isinstance(reply, Failure):
                _log.warning("node %s is left out: %s", node, reply.reason)
                continue
            try:
                name, _ = envelope.read_content(reply.content)
            except ContainerError as error:
                _log.warning("node %s is left out: %s", node, error)
                continue
            if name in names:
                _log.warning("node %s is left out: there is a client %s already", node, name)
                continue
            names[name] = int(node)
        return names

    def _message(self, client: str, kind: str, blob: bytes) -> Message | Failure:
        if client not in self._nodes:
            return Failure(code=RejectionCode.NO_REPLY, reason="no node is known for this client")
        return _wrap(self._nodes[client], client, kind, blob)

    def _converse(
        self, messages: Iterable[tuple[str, Message | Failure]], timeout_s: float
    ) -> Iterator[tuple[str, Message | Failure]]:
        """Push messages as the window allows, and give each one's reply, keyed as it was."""
        waiting: dict[str, tuple[str, float]] = {}
        source = iter(messages)
        exhausted = False
        while waiting or not exhausted:
            while not exhausted and not (self._window and len(waiting) >= self._window):
                key, message = next(source, ("", None))
                if message is None:
                    exhausted = True
                elif isinstance(message, Failure):
                    yield key, message
                # One push a message: a Grid that cannot take one of many does not say which.
                elif message_id := next(iter(self._grid.push_messages([message])), None):
                    waiting[message_id] = (key, time.monotonic())
                else:
                    reason = "the message could not be sent"
                    yield key, Failure(code=RejectionCode.NO_REPLY, reason=reason)
            heard = False
            for reply in self._grid.pull_messages(list(waiting)):
                key, _ = waiting.pop(reply.metadata.reply_to_message_id, ("", 0.0))
                if key:
                    heard = True
                    yield key, _failure_of(reply) or reply
            if timeout_s:
                now = time.monotonic()
                late = [id_ for id_, (_, sent) in waiting.items() if now - sent > timeout_s]
                for key, _ in map(waiting.pop, late):
                    reason = f"expected an answer within {timeout_s:g} s, none came"
                    yield key, Failure(code=RejectionCode.NO_REPLY, reason=reason)
            if waiting and not heard:
                time.sleep(self._poll_s)


def make_server_app(
    play: Callable[[FlowerLink], None], *, clients: int, timeout_s: float = 0.0, window: int = 0
) -> ServerApp:
    """A ServerApp that waits for `clients` nodes and hands `play` the link to them."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        play(FlowerLink(grid, clients=clients, timeout_s=timeout_s, window=window))

    return app


def _wait_for_nodes(grid: Grid, clients: int, timeout_s: float, poll_s: float) -> list[int]:
    deadline = time.monotonic() + timeout_s
    while len(nodes := sorted(grid.get_node_ids())) < clients and time.monotonic() < deadline:
        time.sleep(poll_s)
    return nodes


def _wrap(node: int, client: str, kind: str, blob: bytes) -> Message:
    array = Array("uint8", (len(blob),), envelope.ARRAY_TYPE, blob)
    content = RecordDict(
        {
            envelope.PAYLOAD: ArrayRecord({envelope.BLOB: array}),
            envelope.HEADER: ConfigRecord({envelope.CLIENT: client}),
        }
    )
    return Message(content, node, kind)


def _failure_of(reply: Message) -> Failure | None:
    if not reply.has_error():
        return None
    reason = reply.error.reason or f"error {reply.error.code} without a reason"
    return Failure(code=RejectionCode.CLIENT_FAILED, reason=reason)
