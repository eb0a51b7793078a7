# SPDX-License-Identifier: Apache-2.0
"""The body of a split network as a device sees it: messages out, messages back."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from client_sdk.errors import SplitError
from protocol.activations import decode_states, encode_mask, encode_states
from protocol.errors import ContainerError
from protocol.split import SplitSpec
from protocol.stream import Refused, States, pack_message, unpack_message

Exchange = Callable[[bytes], bytes]
"""Hands a message over and waits for its answer. Raises: SplitError."""


class RemoteBody:
    """An `edge_runtime.split_trainer.Body` behind an exchange of messages, with their bytes."""

    def __init__(self, spec: SplitSpec, exchange: Exchange, *, max_bytes: int) -> None:
        self._spec = spec
        self._exchange = exchange
        self._max_bytes = max_bytes
        self._number = 0
        self.sent_bytes = 0
        self.received_bytes = 0

    def forward(self, hidden: np.ndarray, mask: np.ndarray | None, *, keep: bool) -> np.ndarray:
        """See `Body.forward`. Raises: SplitError."""
        front = b"" if mask is None else encode_mask(mask)
        answer, rows = self._asked("forward", "left", hidden, front, keep=keep)
        return self._decoded(answer, rows, of="left")

    def backward(self, gradient: np.ndarray) -> np.ndarray:
        """See `Body.backward`. Raises: SplitError."""
        answer, rows = self._asked("backward", "entered", gradient, b"", keep=False)
        return self._decoded(answer, rows, of="entered")

    def _asked(
        self, kind: str, answered: str, states: np.ndarray, front: bytes, *, keep: bool
    ) -> tuple[memoryview, int]:
        self._number += 1
        rows = len(states)
        try:
            payload = encode_states(states, self._spec.form)
        except ValueError as error:
            raise SplitError(f"{kind}: {error}") from None
        message = States(kind=kind, number=self._number, rows=rows, keep=keep)  # type: ignore[arg-type]
        blob = pack_message(message, front, payload)
        self.sent_bytes += len(blob)
        came = self._exchange(blob)
        self.received_bytes += len(came)
        try:
            found, rest = unpack_message(came, max_bytes=self._max_bytes)
        except ContainerError as error:
            raise SplitError(f"the server's answer to {kind}: {error}") from None
        if isinstance(found, Refused):
            raise SplitError(f"the server refused {kind} {self._number}: {found.reason}")
        wanted = States(kind=answered, number=self._number, rows=rows)  # type: ignore[arg-type]
        if found != wanted:
            raise SplitError(f"the server's answer to {kind}: expected {wanted}, found {found}")
        return rest, rows

    def _decoded(self, payload: memoryview, rows: int, *, of: str) -> np.ndarray:
        spec = self._spec.leaving if of == "left" else self._spec.entering
        try:
            return decode_states(payload, spec, rows, self._spec.form)
        except ContainerError as error:
            raise SplitError(f"the server's answer: {error}") from None
