# SPDX-License-Identifier: Apache-2.0
"""Containers in messages of Flower's, and what comes back."""

from __future__ import annotations

from typing import Final

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from coordinator.link import Failure
from protocol import envelope
from protocol.errors import ContainerError
from protocol.readiness import Readiness, unpack_readiness
from protocol.rejection import RejectionCode

_SUPERLINK: Final = 1
"""Flower's number for itself: it answers for a node that lost its connection, by an error."""


def readiness_of(reply: Message | Failure) -> Readiness:
    """What a node says of itself; one whose answer is no such thing is not ready."""
    if isinstance(reply, Failure):
        return Readiness(ready=False, reason=reply.reason)
    try:
        return unpack_readiness(envelope.read_content(reply.content)[1])
    except ContainerError as error:
        return Readiness(ready=False, reason=f"its answer cannot be read: {error}")


def wrapped(node: int, client: str, kind: str, blob: bytes) -> Message:
    """A container as a message of a type to a node; see `protocol.envelope`."""
    array = Array("uint8", (len(blob),), envelope.ARRAY_TYPE, blob)
    content = RecordDict(
        {
            envelope.PAYLOAD: ArrayRecord({envelope.BLOB: array}),
            envelope.HEADER: ConfigRecord({envelope.CLIENT: client}),
        }
    )
    return Message(content, node, kind)


def failure_of(reply: Message, node: int) -> Failure | None:
    """What is wrong with the reply to a message for that node; None where it is its answer."""
    other = reply.metadata.src_node_id
    if reply.has_error() and other == _SUPERLINK:
        reason = reply.error.reason or f"error {reply.error.code}"
        return Failure(code=RejectionCode.NO_REPLY, reason=f"SuperLink gave it up: {reason}")
    if other != node:
        reason = f"expected an answer of node {node}, node {other} sent it"
        return Failure(code=RejectionCode.WRONG_CLIENT, reason=reason)
    if not reply.has_error():
        return None
    reason = reply.error.reason or f"error {reply.error.code} without a reason"
    return Failure(code=RejectionCode.CLIENT_FAILED, reason=reason)
