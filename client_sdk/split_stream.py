# SPDX-License-Identifier: Apache-2.0
"""A device's stream to the server that holds the body, opened again where it breaks."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final

import grpc

from client_sdk.errors import SplitError
from protocol.errors import ContainerError
from protocol.stream import METHOD, Close, Open, Ready, Refused, pack_message, unpack_message

_FIRST_BYTES: Final = 4096  # of a `ready`, or of a refusal
# What a broken or a busy connection looks like; everything else will not mend itself.
_PASSING: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


class SplitStream:
    """An `Exchange` over gRPC. Use as a context manager.

    A message that got no answer as the connection broke is sent again on the next one, up to
    `attempts` times with growing pauses; the server answers from memory what it had answered.
    `timeout_s` bounds the wait for one answer.
    """

    def __init__(
        self,
        address: str,
        opened: Open,
        *,
        max_bytes: int,
        credentials: grpc.ChannelCredentials | None = None,
        server_name: str = "",
        timeout_s: float = 120.0,
        attempts: int = 5,
        pause_s: float = 0.5,
    ) -> None:
        self._address = address
        self._opened = opened
        self._credentials = credentials
        self._timeout_s = timeout_s
        self._attempts = attempts
        self._pause_s = pause_s
        self._options: list[tuple[str, int | str]] = [
            ("grpc.max_receive_message_length", max_bytes),
            ("grpc.max_send_message_length", max_bytes),
        ]
        if server_name:
            self._options.append(("grpc.ssl_target_name_override", server_name))
        self._channel: grpc.Channel | None = None
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._call: Any = None

    def __enter__(self) -> SplitStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._call is not None:
            with contextlib.suppress(grpc.RpcError), self._deadline():
                self._outgoing.put(pack_message(Close()))
                self._outgoing.put(None)
                # The server ends the stream once it has read that.
                next(self._call, None)
        self._hang_up()

    def __call__(self, blob: bytes) -> bytes:
        """The answer to a message. Raises: SplitError."""
        pause = self._pause_s
        for attempt in range(self._attempts):
            if attempt:
                time.sleep(pause)
                pause *= 2
            try:
                if self._call is None:
                    self._dial()
                return self._exchanged(blob)
            except grpc.RpcError as error:
                self._hang_up()
                fault = error
                if error.code() not in _PASSING:
                    break
        raise SplitError(
            f"the server at {self._address} could not be reached: {fault.code().name}: "
            f"{fault.details()}"
        )

    def _exchanged(self, blob: bytes) -> bytes:
        with self._deadline():
            self._outgoing.put(blob)
            answer = next(self._call, None)
        if answer is None:
            # Ended without a word: as good as broken.
            raise _EndedError("the stream ended before its answer")
        return bytes(answer)

    def _dial(self) -> None:
        """A new connection, on which the session goes on."""
        if self._credentials is None:
            channel = grpc.insecure_channel(self._address, self._options)
        else:
            channel = grpc.secure_channel(self._address, self._credentials, self._options)
        self._channel = channel
        self._outgoing = queue.SimpleQueue()
        ask = channel.stream_stream(METHOD)
        self._call = ask(_until_none(self._outgoing))
        answer = self._exchanged(pack_message(self._opened))
        try:
            ready, _ = unpack_message(answer, max_bytes=_FIRST_BYTES)
        except ContainerError as error:
            raise SplitError(f"the server's answer to open: {error}") from None
        if isinstance(ready, Refused):
            if ready.again:
                raise _EndedError(ready.reason)
            raise SplitError(f"the server refused the session: {ready.reason}")
        if not isinstance(ready, Ready):
            raise SplitError(f"the server's answer to open: expected ready, found {ready.kind}")

    @contextmanager
    def _deadline(self) -> Iterator[None]:
        """Ends the stream if what happens inside takes longer than an answer may."""
        timer = threading.Timer(self._timeout_s, self._call.cancel)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _hang_up(self) -> None:
        self._outgoing.put(None)
        self._call = None
        if self._channel is not None:
            self._channel.close()
            self._channel = None


class _EndedError(grpc.RpcError):
    """The server ended a stream whose answer was still due, or has no room for one now."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self._reason = reason

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return self._reason


def _until_none(messages: queue.SimpleQueue[bytes | None]) -> Iterator[bytes]:
    while (blob := messages.get()) is not None:
        yield blob
