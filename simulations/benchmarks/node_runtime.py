# SPDX-License-Identifier: Apache-2.0
"""SuperNode's port for the clients that it starts, with messages that wait there.

It is Flower's own code: what a client process says to a SuperNode it says here, with no SuperLink
behind it.

*Source* Flower 1.41, `flwr.supernode`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import uvicorn
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict, UserConfig
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeStateFactory

from protocol import envelope
from simulations.errors import SimulationError

_RUN: Final = 1
_NODE: Final = 2
_UP_S: Final = 30.0


class NodeRuntime:
    """What a SuperNode has for its clients. `address` is of loopback, without TLS."""

    def __init__(self, factory: NodeStateFactory, address: str) -> None:
        self.address = address
        self._state = factory.state()
        self._store = factory.objectstore_factory.store()
        self._state.set_node_id(_NODE)
        fab = Fab("", b"an app bundle that nobody unpacks", {})
        self._fab = self._state.store_fab(fab)
        run = Run.create_empty(_RUN)
        run.fab_id, run.fab_version, run.fab_hash = "fedloom/fedloom", "1.0.0", self._fab
        self._state.store_run(run)
        context = Context(
            run_id=_RUN,
            node_id=_NODE,
            node_config=UserConfig(),
            state=RecordDict(),
            run_config=UserConfig(),
        )
        self._state.set_run_series_context(run.series_id, context)

    def ask(self, kind: str, blob: bytes) -> str:
        """Leaves a message for a client; the token of the task, which the client has to show."""
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = _RUN, 1, 1
        array = Array("uint8", (len(blob),), envelope.ARRAY_TYPE, blob)
        content = RecordDict(
            {
                envelope.PAYLOAD: ArrayRecord({envelope.BLOB: array}),
                envelope.HEADER: ConfigRecord({envelope.CLIENT: "coordinator"}),
            }
        )
        message = Message(content, _NODE, kind)
        message.metadata.__dict__["_message_id"] = message.object_id  # as a SuperNode does
        self._state.store_message(message)
        self._store.preregister(_RUN, get_object_tree(message))
        for name, held in get_all_nested_objects(message).items():
            self._store.put(name, held.deflate())
        task = self._state.create_task(TaskType.CLIENT_APP, _RUN, self._fab)
        token = None if task is None else self._state.claim_task(task)
        if token is None:
            raise SimulationError("this version of Flower takes no task; install flwr>=1.41,<1.43")
        return token

    def answer(self) -> bytes:
        """What the client sent back. Raises: SimulationError where it was an error, or nothing."""
        replies = self._state.get_messages_legacy(is_reply=True)
        if not replies:
            raise SimulationError("the client's process ended without an answer")
        (reply,) = replies
        if reply.has_error():
            raise SimulationError(f"the client answered with an error: {reply.error.reason}")
        whole = pull_and_inflate_object_from_tree(
            self._store.get_object_tree(reply.metadata.message_id),
            lambda name: self._store.get(name) or b"",
            lambda _: None,
            return_type=Message,
        )
        self._state.delete_messages(
            message_ids=[reply.metadata.message_id, reply.metadata.reply_to_message_id]
        )
        return envelope.read_content(whole.content)[1]


@contextmanager
def node_runtime() -> Iterator[NodeRuntime]:
    """The port is open inside. Raises: SimulationError where it cannot be opened."""
    factory = NodeStateFactory(objectstore_factory=ObjectStoreFactory())
    quiet = logging.getLogger("flwr").level
    logging.getLogger("flwr").setLevel(logging.ERROR)
    server = uvicorn.Server(
        uvicorn.Config(create_app(factory), host="127.0.0.1", port=0, log_level="error", ws="none")
    )
    thread = threading.Thread(target=server.run, name="node-runtime", daemon=True)
    thread.start()
    try:
        deadline = threading.Event()
        for _ in range(int(_UP_S / 0.05)):
            if server.started or not thread.is_alive():
                break
            deadline.wait(0.05)
        if not server.started:
            raise SimulationError("SuperNode's port for clients could not be opened on loopback")
        ((found, port),) = [
            each.getsockname()[:2] for one in server.servers for each in one.sockets
        ]
        yield NodeRuntime(factory, f"{found}:{port}")
    finally:
        server.should_exit = True
        thread.join(_UP_S)
        logging.getLogger("flwr").setLevel(quiet)
