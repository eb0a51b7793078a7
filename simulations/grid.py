# SPDX-License-Identifier: Apache-2.0
"""A Flower Grid in one process: every message is answered by a function, without a network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from client_sdk.client_app import make_reply
from protocol import envelope

_RUN_ID: Final = 1
_SERVER_NODE: Final = 1

# [(client, "fit" or "evaluate", plan)] -> (client, update) for each, in any order. An exception as
# a value is that client's failure; one that is raised is the simulator's and ends the run.
Serve = Callable[[list[tuple[str, str, bytes]]], Iterable[tuple[str, bytes | Exception]]]


class InProcessGrid(Grid):
    """A Grid whose nodes are `clients`. `serve` gets all messages that wait at once, in the order
    in which they were pushed, so that it may run them one by one or many in a cohort. `said` is
    what clients answer when they are asked what they are, packed readinesses."""

    def __init__(
        self,
        clients: Sequence[str],
        serve: Serve,
        said: Mapping[str, bytes] = MappingProxyType({}),
    ) -> None:
        self._names = dict(enumerate(clients, start=_SERVER_NODE + 1))
        self._serve = serve
        self._said = said
        self._pending: dict[str, Message] = {}
        self._count = 0
        self.set_run(Run.create_empty(_RUN_ID))

    def set_run(self, run: Run) -> None:
        """Take a run's identity; Flower reads it from a process-wide place for each Message."""
        self._run = run
        TaskIdentity.run_id, TaskIdentity.task_id = run.run_id, 1
        TaskIdentity.node_id = _SERVER_NODE

    @property
    def run(self) -> Run:
        """The run, which has no application: nothing is installed in this process."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message to a node; `Message` itself does the same."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """The nodes' numbers, in the order of the clients."""
        return list(self._names)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Keep messages until they are pulled for."""
        ids = []
        for message in messages:
            self._count += 1
            message_id = f"message-{self._count}"
            message.metadata.__dict__["_message_id"] = message_id  # as Flower's own Grids do
            self._pending[message_id] = message
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Answer the messages that wait, each as soon as `serve` has its answer."""
        work: dict[str, Message] = {}
        for message_id in [id_ for id_ in message_ids if id_ in self._pending]:
            name = self._names[self._pending[message_id].metadata.dst_node_id]
            if name in work:
                continue  # `serve` knows clients by name: the second message waits for its turn
            message = self._pending.pop(message_id)
            if message.metadata.message_type == envelope.HELLO:
                yield make_reply(message, name, self._said.get(name, b""))
            else:
                work[name] = message
        kinds = {message_type: kind for kind, message_type in envelope.MESSAGE_TYPES.items()}
        asked = [
            (name, kinds[m.metadata.message_type], envelope.read_content(m.content)[1])
            for name, m in work.items()
        ]
        for name, answer in self._serve(asked) if asked else ():
            yield make_reply(work.pop(name), name, answer)
        for name, message in work.items():
            yield make_reply(message, name, RuntimeError("the simulated client gave no answer"))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Push and pull in one call; nothing here waits, so `timeout` has nothing to limit."""
        return list(self.pull_messages(self.push_messages(messages)))
