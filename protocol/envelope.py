# SPDX-License-Identifier: Apache-2.0
"""How a container rides in a Flower message: the names that both sides must agree on.

A message's content is `{"payload": {"blob": uint8 [n]}, "header": {"client": name}}`. The array's
bytes are the container itself under a serialisation type of our own: numpy's file format, which
Flower's default parses on arrival, would add a header and a parser for nothing.

This module knows no Flower: a content is read by its attributes, so that both adapters share it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from protocol import _checks
from protocol.errors import MalformedError
from protocol.limits import MAX_CLIENT_LENGTH

PAYLOAD: Final = "payload"
BLOB: Final = "blob"
HEADER: Final = "header"
CLIENT: Final = "client"
ARRAY_TYPE: Final = "fedloom.bytes"

HELLO: Final = "query.hello"  # asks a node which client it is; answered with an empty blob
MESSAGE_TYPES: Final[Mapping[str, str]] = {
    "fit": "train.fit",
    "evaluate": "evaluate.score",
    "sum": "query.sum",
}


def read_content(content: Mapping[str, Any]) -> tuple[str, bytes]:
    """Client name and container bytes of a message's content.

    Raises: MalformedError for any other content; the bytes themselves are not looked at.
    """
    try:
        client, array = content[HEADER][CLIENT], content[PAYLOAD][BLOB]
        kind, data = (array.dtype, array.stype), array.data
    except (KeyError, TypeError, AttributeError) as error:
        raise MalformedError(
            f'message: expected the records "{PAYLOAD}" and "{HEADER}", found others ({error!r})'
        ) from None
    if kind != ("uint8", ARRAY_TYPE) or not isinstance(data, bytes):
        raise MalformedError(f"message: expected a uint8 array of {ARRAY_TYPE}, found {kind}")
    return _checks.text("client", client, MAX_CLIENT_LENGTH, MalformedError), data
