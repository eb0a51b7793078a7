# SPDX-License-Identifier: Apache-2.0
"""The client side of Flower: a ClientApp around one function that answers plans.

Flower may run every message in a new process and on a copy of the app, so the app holds no state:
`open_client` finds the client again from the node's configuration, and caches what is worth it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from client_sdk.errors import SumError
from protocol import envelope

_CLIENT_RAISED: Final = 2  # Flower's code for a client function that raised
_MAX_REASON: Final = 500


def _nothing_to_say(survey: bytes) -> bytes:
    """Of a client that may always be asked."""
    return b""


def _sums_nothing(request: bytes) -> bytes:
    """Of a client that takes part in no secure sum."""
    raise SumError("this client takes part in no secure sums")


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """Who this node is, and what it does with a plan."""

    name: str
    answer: Callable[[bytes], bytes]
    survey: Callable[[bytes], bytes] = _nothing_to_say
    """What it answers to the blob of a hello; b"" is an answer, too."""
    sum: Callable[[bytes], bytes] = _sums_nothing
    """What it answers to a message of a secure sum."""


NodeConfig = Mapping[str, bool | int | float | str]
OpenClient = Callable[[NodeConfig], Client]


def make_client_app(open_client: OpenClient) -> ClientApp:
    """A ClientApp whose client is found by `open_client(node_config)`.

    A simulation's node configuration holds "partition-id" (0, 1, ...). Flower's Ray engine sends
    `open_client` along with every message: give it a function of a module, or a
    `functools.partial` of one with small arguments.
    """
    app = ClientApp()

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        return _reply(message, open_client, context, lambda client: client.survey)

    @app.train("fit")
    def fit(message: Message, context: Context) -> Message:
        return _reply(message, open_client, context, lambda client: client.answer)

    @app.evaluate("score")
    def score(message: Message, context: Context) -> Message:
        return _reply(message, open_client, context, lambda client: client.answer)

    @app.query("sum")
    def sum(message: Message, context: Context) -> Message:
        return _reply(message, open_client, context, lambda client: client.sum)

    return app


def _reply(
    message: Message,
    open_client: OpenClient,
    context: Context,
    part: Callable[[Client], Callable[[bytes], bytes]],
) -> Message:
    try:
        client = open_client(context.node_config)
        _, asked = envelope.read_content(message.content)
        blob = part(client)(asked)
    # Whatever goes wrong here is this client's alone: the coordinator must hear of it and go on.
    except Exception as error:
        return make_reply(message, "", error)
    return make_reply(message, client.name, blob)


def make_reply(message: Message, name: str, answer: bytes | Exception) -> Message:
    """The Flower reply that carries a client's answer, or says that it failed."""
    if isinstance(answer, Exception):
        reason = f"{type(answer).__name__}: {answer}"[:_MAX_REASON]
        return Message(Error(code=_CLIENT_RAISED, reason=reason), reply_to=message)
    array = Array("uint8", (len(answer),), envelope.ARRAY_TYPE, answer)
    content = RecordDict(
        {
            envelope.PAYLOAD: ArrayRecord({envelope.BLOB: array}),
            envelope.HEADER: ConfigRecord({envelope.CLIENT: name}),
        }
    )
    return Message(content, reply_to=message)
