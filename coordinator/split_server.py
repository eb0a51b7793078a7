# SPDX-License-Identifier: Apache-2.0
"""The server that holds the body: one gRPC stream a device and round, under TLS.

A stream begins with `open`, whose client has to be the one that its certificate names, and a
session that the coordinator expects. From then on it asks and is answered in turns, one message at
a time, so that no device can fill the server's memory. What several devices ask at the same time
goes through the body in one pass. A session outlives its stream for a while: a device whose
connection broke opens it again and goes on where it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
import numpy as np

from coordinator.split_session import Engine, Session, Task, alike, run_tasks
from protocol.errors import ProtocolError
from protocol.limits import MAX_REASON_LENGTH
from protocol.split import SplitSpec, largest_message
from protocol.stream import (
    METHOD,
    Close,
    Open,
    Ready,
    Refused,
    pack_message,
    unpack_message,
)

_FIRST_BYTES: Final = 4096  # of an `open`
_SERVICE, _SESSION = METHOD.strip("/").split("/")

Admit = Callable[[Open], str]
"""Why a session is refused; "" where it is expected."""

Count = Callable[[int, int], None]
"""Told of bytes that came up and went down in a session."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds on what devices may ask for; times in seconds."""

    rows: int  # samples of one message
    rows_together: int = 256  # samples of one pass
    sessions: int = 1_000  # streams at once
    handshake_s: float = 10.0  # from a connection's begin to the end of the TLS handshake
    idle_s: float = 20.0  # that a connection has no stream
    open_s: float = 10.0  # from a stream's begin to its `open`
    message_s: float = 60.0  # from an answer to the next message
    resume_s: float = 60.0  # that a session outlives its stream
    linger_s: float = 0.002  # waited for others' messages where several devices are at work


def _uncounted(up: int, down: int) -> None:
    """Where nobody counts."""


@dataclass(slots=True)
class _Entry:
    """A session, and the stream that it is on."""

    session: Session
    client: str
    nonce: str
    stream: object | None = None
    left_at: float = 0.0
    work: asyncio.Task[bytes] | None = None


@dataclass(slots=True)
class _Waiting:
    client: str
    task: Task
    answer: asyncio.Future[tuple[np.ndarray, Any]] = field(repr=False)


class Batcher:
    """Puts tasks that wait at the same time through the engine in one pass, in their order."""

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self._engine = engine
        self._limits = limits
        self._waiting: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="body")
        self.streams: Counter[str] = Counter()
        """Of every client at work. With one client there is nobody to wait for: a piece of its
        batch is better computed while the next one travels."""

    async def result(self, client: str, task: Task) -> tuple[np.ndarray, Any]:
        """The engine's result. Raises: whatever the engine raises."""
        waiting = _Waiting(client, task, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._arrived.set()
        return await waiting.answer

    async def run(self) -> None:
        """Works until it is cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                await self._arrived.wait()
                if len({waiting.client for waiting in self._waiting}) < len(self.streams):
                    await asyncio.sleep(self._limits.linger_s)
                # Not kept by a name here: what a pass leaves belongs to its sessions alone.
                await self._pass(loop, self._next())
                if not self._waiting:
                    self._arrived.clear()
        finally:
            self._thread.shutdown(wait=False)

    async def _pass(self, loop: asyncio.AbstractEventLoop, together: Sequence[_Waiting]) -> None:
        """Everybody's answer; one device's message must not end the others' sessions."""
        if not together:
            return
        tasks = [waiting.task for waiting in together]
        try:
            results = await loop.run_in_executor(self._thread, run_tasks, self._engine, tasks)
        except Exception as fault:
            if len(together) > 1:
                for waiting in together:
                    await self._pass(loop, [waiting])
            elif not together[0].answer.done():
                together[0].answer.set_exception(fault)
            return
        for waiting, result in zip(together, results, strict=True):
            if not waiting.answer.done():
                waiting.answer.set_result(result)

    def _next(self) -> list[_Waiting]:
        """The first that waits, and those like it that fit into one pass with it."""
        together: list[_Waiting] = []
        others: list[_Waiting] = []
        rows = 0
        while self._waiting:
            waiting = self._waiting.popleft()
            if waiting.answer.cancelled():
                continue
            size = waiting.task.message.rows
            fits = not together or (
                alike(together[0].task, waiting.task) and rows + size <= self._limits.rows_together
            )
            if fits:
                together.append(waiting)
                rows += size
            else:
                others.append(waiting)
        self._waiting.extend(others)
        return together


class SplitServer:
    """Sessions over gRPC. Use as an async context manager; `port` is known inside.

    `admit` says whether a session is expected. With `credentials` the peer's certificate must name
    the client as its common name; without, connections are plain, for tests on one machine.
    """

    def __init__(
        self,
        engine: Engine,
        spec: SplitSpec,
        admit: Admit,
        limits: Limits,
        *,
        address: str = "127.0.0.1:0",
        credentials: grpc.ServerCredentials | None = None,
        count: Count = _uncounted,
    ) -> None:
        self._spec = spec
        self._admit = admit
        self._limits = limits
        self._address = address
        self._credentials = credentials
        self._count = count
        self._batcher = Batcher(engine, limits)
        self._entries: dict[tuple[str, int, int], _Entry] = {}
        self._streams = 0
        self._most_bytes = largest_message(spec, limits.rows)
        self.port = 0

    async def __aenter__(self) -> SplitServer:
        most = self._most_bytes
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", most),
                ("grpc.max_send_message_length", most),
                ("grpc.keepalive_time_ms", 20_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.http2.max_pings_without_data", 0),
                ("grpc.so_reuseport", 0),
                ("grpc.server_handshake_timeout_ms", round(1000 * self._limits.handshake_s)),
                ("grpc.max_connection_idle_ms", round(1000 * self._limits.idle_s)),
            ]
        )
        handler = grpc.stream_stream_rpc_method_handler(self._serve)
        service = grpc.method_handlers_generic_handler(_SERVICE, {_SESSION: handler})
        self._server.add_generic_rpc_handlers((service,))
        if self._credentials is None:
            self.port = self._server.add_insecure_port(self._address)
        else:
            self.port = self._server.add_secure_port(self._address, self._credentials)
        self._work = asyncio.create_task(self._batcher.run())
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(grace=1.0)
        self._work.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._work

    async def _serve(self, _: object, context: Any) -> None:
        """One stream, from its first message to its last answer."""
        if self._streams >= self._limits.sessions:
            await context.write(
                _refusal(f"expected at most {self._limits.sessions} streams at once", again=True)
            )
            return
        self._streams += 1
        try:
            await self._stream(context)
        finally:
            self._streams -= 1

    async def _stream(self, context: Any) -> None:
        blob = await _read(context, self._limits.open_s)
        if not blob:
            await context.write(_refusal(f"expected open within {self._limits.open_s:g} s"))
            return
        try:
            opened, _ = unpack_message(blob, max_bytes=_FIRST_BYTES)
        except ProtocolError as error:
            await context.write(_refusal(f"expected open: {error}"))
            return
        if not isinstance(opened, Open):
            await context.write(_refusal(f"expected open, found {opened.kind}"))
            return
        if reason := self._reason_against(opened, context):
            await context.write(_refusal(reason))
            return
        entry = self._entry(opened)
        # Whoever opened last has the session: the stream before may be a connection that died.
        stream = entry.stream = object()
        streams = self._batcher.streams
        streams[opened.client] += 1
        try:
            await context.write(pack_message(Ready(answered=entry.session.answered)))
            await self._converse(context, entry, stream)
        finally:
            streams[opened.client] -= 1
            if not streams[opened.client]:
                del streams[opened.client]
            if entry.stream is stream:
                entry.stream, entry.left_at = None, time.monotonic()
                loop = asyncio.get_running_loop()
                loop.call_later(self._limits.resume_s, self._forget_the_lost)

    async def _converse(self, context: Any, entry: _Entry, stream: object) -> None:
        """Message by message, until the device closes, breaks off or says what cannot be."""
        while blob := await _read(context, self._limits.message_s):
            if entry.stream is not stream:
                await context.write(_refusal("the session was opened again on another stream"))
                return
            if entry.work is not None:
                # Of a message before the connection broke: its answer comes first.
                await asyncio.wait([entry.work])
            try:
                task = entry.session.read(blob)
            except ProtocolError as error:
                if _closes(blob):
                    self._forget(entry)
                    return
                await context.write(_refusal(str(error)))
                return
            if isinstance(task, bytes):
                await context.write(task)
                self._count(len(blob), len(task))
                continue
            entry.work = asyncio.create_task(self._work_on(entry, task))
            # The stream may end while the body works: the answer is then there for the next one.
            answer = await asyncio.shield(entry.work)
            entry.work = None
            await context.write(answer)
            self._count(len(blob), len(answer))
            if not entry.session.sound:
                self._forget(entry)
                return

    async def _work_on(self, entry: _Entry, task: Task) -> bytes:
        try:
            return entry.session.answer(task, *await self._batcher.result(entry.client, task))
        except Exception as error:
            # Of one device's message: it is told, and the others go on.
            entry.session.sound = False
            return _refusal(f"{task.message.kind} {task.message.number}: {error}")

    def _reason_against(self, opened: Open, context: Any) -> str:
        if self._credentials is not None:
            names = context.auth_context().get("x509_common_name", [])
            known = [name.decode("utf-8", "replace") for name in names]
            if known != [opened.client]:
                return f"the certificate is of {', '.join(known) or 'nobody'}, not {opened.client}"
        return self._admit(opened)

    def _entry(self, opened: Open) -> _Entry:
        """The session of a client, round and lane: as it was left, or a new one."""
        for key in list(self._entries):
            if key[0] == opened.client and key[1] < opened.round:
                del self._entries[key]
        key = (opened.client, opened.round, opened.lane)
        entry = self._entries.get(key)
        if entry is None or entry.nonce != opened.nonce:
            session = Session(self._spec, most_rows=self._limits.rows)
            entry = self._entries[key] = _Entry(
                session=session, client=opened.client, nonce=opened.nonce
            )
        return entry

    def _forget_the_lost(self) -> None:
        """Sessions that nobody came back to, with all that was kept for their way back."""
        last = time.monotonic() - self._limits.resume_s
        for key, entry in list(self._entries.items()):
            if entry.stream is None and entry.left_at <= last:
                del self._entries[key]

    def _forget(self, entry: _Entry) -> None:
        for key, known in list(self._entries.items()):
            if known is entry:
                del self._entries[key]


async def _read(context: Any, seconds: float) -> bytes:
    """The next message; nothing where none came in time, or none will."""
    try:
        blob = await asyncio.wait_for(context.read(), seconds)
    except TimeoutError:
        return b""
    return b"" if blob is grpc.aio.EOF else bytes(blob)


def _closes(blob: bytes) -> bool:
    try:
        message, _ = unpack_message(blob, max_bytes=_FIRST_BYTES)
    except ProtocolError:
        return False
    return isinstance(message, Close)


def _refusal(reason: str, *, again: bool = False) -> bytes:
    words = "".join(c if c.isprintable() else " " for c in reason)[:MAX_REASON_LENGTH]
    return pack_message(Refused(reason=words or "no reason is known", again=again))
