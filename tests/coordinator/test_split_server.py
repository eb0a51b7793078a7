# SPDX-License-Identifier: Apache-2.0
"""Over real sockets on this machine, with an engine of two lines in the place of a network."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import grpc
import numpy as np
import pytest

from client_sdk.errors import SplitError
from client_sdk.split_body import RemoteBody
from client_sdk.split_stream import SplitStream
from coordinator.split_server import Limits, SplitServer
from protocol.split import SplitSpec, largest_message
from protocol.stream import METHOD, Close, Open, States, pack_message, unpack_message
from simulations.throwaway import ThrowAway

SPEC = SplitSpec(entering_tokens=3, leaving_tokens=3, width=4)
MASKED = SplitSpec(entering_tokens=3, leaving_tokens=1, width=4, masked=True)
LIMITS = Limits(rows=8, open_s=2.0, message_s=5.0)
MOST = largest_message(SPEC, 8)


class Doubling:
    """out = 2 * in, of the first token where there is a mask; counts its passes."""

    def __init__(self, *, seconds: float = 0.0) -> None:
        self.passes: list[tuple[str, int]] = []
        self.seconds = seconds

    def forward(
        self, entering: Sequence[np.ndarray], masks: Sequence[np.ndarray] | None, *, keep: bool
    ) -> list[tuple[np.ndarray, Any]]:
        self.passes.append(("forward", len(entering)))
        time.sleep(self.seconds)
        if masks is not None:
            return [
                (2 * states[:, :1] + mask.sum(axis=(1, 2, 3)).reshape(-1, 1, 1), len(states))
                for states, mask in zip(entering, masks, strict=True)
            ]
        return [(2 * states, len(states) if keep else None) for states in entering]

    def backward(self, returning: Sequence[tuple[Any, np.ndarray]]) -> list[np.ndarray]:
        self.passes.append(("backward", len(returning)))
        if any(gradient.max() > 1e6 for _, gradient in returning):
            raise RuntimeError("the engine broke")
        return [2 * gradient for kept, gradient in returning if kept == len(gradient)]


def opened(client: str = "ada", *, round: int = 1, nonce: str = "ab" * 8, lane: int = 0) -> Open:
    return Open(job="c" * 64, round=round, client=client, nonce=nonce, lane=lane)


@contextmanager
def serving(
    engine: Any = None, *, spec: SplitSpec = SPEC, limits: Limits = LIMITS, admit: Any = None,
    credentials: Any = None, address: str = "127.0.0.1:0",
) -> Iterator[str]:  # fmt: skip
    """A server on a thread of its own; gives its address."""
    up, down = threading.Event(), threading.Event()
    found: list[int] = []

    async def serve() -> None:
        server = SplitServer(
            engine or Doubling(), spec, admit or (lambda asked: ""), limits,
            address=address, credentials=credentials,
        )  # fmt: skip
        async with server:
            found.append(server.port)
            up.set()
            await asyncio.to_thread(down.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert up.wait(10)
        yield f"127.0.0.1:{found[0]}"
    finally:
        down.set()
        thread.join(10)
        assert not thread.is_alive()


def stream(address: str, asked: Open | None = None, **options: Any) -> SplitStream:
    given = {"max_bytes": MOST, "pause_s": 0.05, "timeout_s": 5.0, **options}
    return SplitStream(address, asked or opened(), **given)


def body(exchange: Any, spec: SplitSpec = SPEC) -> RemoteBody:
    return RemoteBody(spec, exchange, max_bytes=largest_message(spec, 8))


def states(value: float = 1.0, rows: int = 2) -> np.ndarray:
    return np.full((rows, 3, 4), value, np.float32)


def test_states_go_there_and_gradients_come_back() -> None:
    with serving() as address, stream(address) as exchange:
        remote = body(exchange)
        for number in range(1, 4):
            assert np.array_equal(
                remote.forward(states(number), None, keep=True), states(2 * number)
            )
            assert np.array_equal(remote.backward(states(-number)), states(-2 * number))
        assert np.array_equal(remote.forward(states(9, rows=8), None, keep=False), states(18, 8))


def test_masks_go_with_states_and_the_answer_may_be_one_token() -> None:
    with serving(spec=MASKED) as address, stream(address) as exchange:
        mask = np.array([0, 0, -10_000], np.float32).reshape(1, 1, 1, 3).repeat(2, axis=0)
        left = body(exchange, MASKED).forward(states(), mask, keep=True)
        assert np.array_equal(left, np.full((2, 1, 4), 2 - 10_000, np.float32))


def test_the_bytes_of_a_session_are_counted() -> None:
    sizes: list[int] = []
    with serving() as address, stream(address) as exchange:

        def counted(blob: bytes) -> bytes:
            answer = exchange(blob)
            sizes.append(len(blob) + len(answer))
            return answer

        remote = body(counted)
        remote.forward(states(), None, keep=True)
        remote.backward(states())
        assert remote.sent_bytes + remote.received_bytes == sum(sizes)
        assert remote.sent_bytes > 2 * states().nbytes


def raw_call(address: str) -> tuple[grpc.Channel, Any, Any]:
    """A stream without `SplitStream`, to say on it what a device would not."""
    import queue

    channel = grpc.insecure_channel(address)
    outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    call = channel.stream_stream(METHOD)(iter(outgoing.get, None))
    return channel, call, outgoing.put


def answers(address: str, *blobs: bytes) -> list[Any]:
    """What is said to these messages, message by message, until the stream ends."""
    channel, call, say = raw_call(address)
    found = []
    with channel:
        for blob in blobs:
            say(blob)
            came = next(call, None)
            if came is None:
                break
            found.append(unpack_message(came, max_bytes=MOST)[0])
        say(None)
    return found


OPEN = pack_message(opened())
FORWARD = pack_message(States(kind="forward", number=1, rows=2), states().tobytes())


@pytest.mark.parametrize(("blobs", "words"), [
    ((b"GET / HTTP/1.1",), "expected open: message"),
    ((FORWARD,), "expected open, found forward"),
    ((pack_message(Close()),), "expected open, found close"),
    ((b"x" * 5000,), "expected at most 4096 bytes"),
    ((OPEN, OPEN), "expected forward or backward, found open"),
    ((OPEN, b"x" * 50), "message: expected it to start"),
    ((OPEN, FORWARD[:-1]), "expected 96 bytes of float32, found 95"),
    ((OPEN, pack_message(States(kind="forward", number=2, rows=2))), "number: expected 1"),
    ((OPEN, pack_message(States(kind="forward", number=1, rows=9))), "rows: expected at most 8"),
    ((OPEN, pack_message(States(kind="backward", number=1, rows=2))), "a forward that keeps"),
    ((OPEN, pack_message(States(kind="left", number=1, rows=2))), "or backward, found left"),
    ((OPEN, pack_message(States(kind="forward", number=1, rows=2), b"1234")), "expected 96 bytes"),
    (
        (OPEN, pack_message(States(kind="forward", number=1, rows=2), states(np.nan).tobytes())),
        "expected finite values",
    ),
    (
        (OPEN, FORWARD, pack_message(States(kind="backward", number=2, rows=1), b"")),
        "rows: expected 2 as of the forward before, found 1",
    ),
], ids=lambda value: value[:30] if isinstance(value, str) else "")  # fmt: skip
def test_what_cannot_be_said_now_is_refused_with_the_reason(
    blobs: tuple[bytes, ...], words: str
) -> None:
    with serving() as address:
        found = answers(address, *blobs)
        assert found[-1].kind == "refused"
        assert words in found[-1].reason
        # The server goes on: the next device is served.
        with stream(address, opened("bob")) as exchange:
            assert np.array_equal(body(exchange).forward(states(), None, keep=True), states(2))


def test_sessions_that_nobody_expects_are_refused() -> None:
    def admit(asked: Open) -> str:
        return "" if asked.nonce == "cd" * 8 else "the plan of this round has another nonce"

    with serving(admit=admit) as address:
        with stream(address) as exchange, pytest.raises(SplitError, match="has another nonce"):
            exchange(FORWARD)
        with stream(address, opened(nonce="cd" * 8)) as exchange:
            body(exchange).forward(states(), None, keep=True)


def test_a_session_goes_on_after_its_connection_broke() -> None:
    engine = Doubling()
    with serving(engine) as address:
        channel, call, say = raw_call(address)
        say(OPEN)
        say(FORWARD)
        assert unpack_message(next(call), max_bytes=MOST)[0].answered == 0
        left = next(call)
        channel.close()  # with an answer that the device, let us say, never saw
        (ready, again, more) = answers(
            address, OPEN, FORWARD,
            pack_message(States(kind="backward", number=2, rows=2), states().tobytes()),
        )  # fmt: skip
        assert ready.answered == 1
        assert again == unpack_message(left, max_bytes=MOST)[0]
        assert more.kind == "entered"
    assert engine.passes == [("forward", 1), ("backward", 1)], "nothing was computed twice"


def test_an_answer_that_was_on_its_way_is_there_when_the_device_comes_back() -> None:
    engine = Doubling(seconds=0.3)
    with serving(engine) as address:
        channel, call, say = raw_call(address)
        say(OPEN)
        next(call)
        say(FORWARD)
        time.sleep(0.1)
        channel.close()  # while the body works
        found = answers(address, OPEN, FORWARD)
        assert [message.kind for message in found] == ["ready", "left"]
    assert engine.passes == [("forward", 1)]


def test_devices_come_back_to_a_server_that_was_away() -> None:
    with serving() as address, stream(address, attempts=8) as exchange:
        body(exchange).forward(states(), None, keep=True)
    with ExitStack() as stack:
        late = threading.Timer(0.4, lambda: stack.enter_context(serving(address=address)))
        late.start()
        with stream(address, attempts=8) as exchange:
            assert np.array_equal(body(exchange).forward(states(), None, keep=True), states(2))
        late.join()


def test_a_server_that_is_not_there_is_an_error_after_some_attempts() -> None:
    with serving() as address:
        pass
    unreachable = pytest.raises(SplitError, match=f"{address} could not be reached: UNAVAILABLE")
    with stream(address, attempts=2) as exchange, unreachable:
        exchange(FORWARD)


def test_another_nonce_is_another_session() -> None:
    with serving() as address:
        answers(address, OPEN, FORWARD)
        (ready,) = answers(address, pack_message(opened(nonce="cd" * 8)))
        assert ready.answered == 0
        (ready,) = answers(address, pack_message(opened(nonce="cd" * 8, round=2)))
        assert ready.answered == 0


def test_what_was_kept_for_a_device_that_vanished_is_freed() -> None:
    class Keeping(Doubling):
        """What it keeps can be watched."""

        def forward(self, *arguments: Any, **options: Any) -> list[tuple[np.ndarray, Any]]:
            answers = super().forward(*arguments, **options)
            kept = np.zeros(8)
            watched.append(weakref.ref(kept))
            return [(left, kept) for left, _ in answers]

    watched: list[weakref.ref[np.ndarray]] = []
    limits = Limits(rows=8, resume_s=0.3)
    with serving(Keeping(), limits=limits) as address:
        channel, call, say = raw_call(address)
        for blob in (OPEN, FORWARD):
            say(blob)
            next(call)
        assert watched[0]() is not None
        channel.close()  # the connection is gone, and nobody opens another
        assert eventually(lambda: watched[0]() is None)


def eventually(holds: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether something comes to hold."""
    last = time.monotonic() + seconds
    while not holds() and time.monotonic() < last:
        time.sleep(0.02)
    return holds()


def test_a_closed_session_is_forgotten() -> None:
    with serving() as address:
        with stream(address) as exchange:
            body(exchange).forward(states(), None, keep=True)
        (ready,) = answers(address, OPEN)
        assert ready.answered == 0


def test_a_message_that_breaks_the_engine_ends_its_own_session_alone() -> None:
    with (
        serving() as address,
        stream(address, opened("eve")) as bad,
        stream(address, opened("bob")) as good,
    ):
        mine, other = body(bad), body(good)
        mine.forward(states(), None, keep=True)
        other.forward(states(), None, keep=True)
        with pytest.raises(SplitError, match="backward 2: the engine broke"):
            mine.backward(states(1e7))
        assert np.array_equal(other.backward(states(3)), states(6))


def test_a_message_that_breaks_a_pass_of_several_leaves_the_others_theirs() -> None:
    limits = Limits(rows=8, linger_s=0.3)
    with serving(limits=limits) as address, ThreadPoolExecutor(3) as pool:
        ready = threading.Barrier(3)

        def work(number: int) -> str:
            with stream(address, opened(f"client-{number}")) as exchange:
                remote = body(exchange)
                remote.forward(states(), None, keep=True)
                ready.wait(10)
                try:
                    remote.backward(states(1e7 if number == 1 else number))
                except SplitError as error:
                    return str(error)
                return "served"

        found = list(pool.map(work, range(3)))
    assert found[0] == found[2] == "served"
    assert "the engine broke" in found[1]


def test_streams_that_say_nothing_are_ended() -> None:
    with serving(limits=Limits(rows=8, open_s=0.2, message_s=0.2)) as address:
        channel, call, say = raw_call(address)
        with channel:
            message, _ = unpack_message(next(call), max_bytes=MOST)
            assert message.reason == "expected open within 0.2 s"
        channel, call, say = raw_call(address)
        with channel:
            say(OPEN)
            assert unpack_message(next(call), max_bytes=MOST)[0].kind == "ready"
            assert next(call, None) is None, "no message came in time"


def test_no_more_streams_than_allowed() -> None:
    with serving(limits=Limits(rows=8, sessions=1)) as address:
        channel, call, say = raw_call(address)
        with channel:
            say(OPEN)
            next(call)
            (message,) = answers(address, pack_message(opened("bob")))
            assert message.again and "at most 1 streams" in message.reason


def test_messages_of_several_devices_go_through_in_one_pass() -> None:
    engine = Doubling(seconds=0.05)
    limits = Limits(rows=8, rows_together=8, linger_s=0.2)
    with serving(engine, limits=limits) as address, ThreadPoolExecutor(4) as pool:
        started = threading.Barrier(4)

        def work(number: int) -> bool:
            with stream(address, opened(f"client-{number}")) as exchange:
                remote = body(exchange)
                remote.forward(states(), None, keep=True)  # all are there from now on
                started.wait(10)
                left = remote.forward(states(number), None, keep=True)
                entered = remote.backward(states(-number))
                return bool((left == 2 * number).all() and (entered == -2 * number).all())

        assert all(pool.map(work, range(1, 5)))
    assert sum(count for _, count in engine.passes) == 12
    assert ("forward", 4) in engine.passes, "four devices of two rows each fit into one pass"
    assert max(count for _, count in engine.passes) == 4


def test_lanes_of_one_device_do_not_wait_for_each_other() -> None:
    engine = Doubling()
    # Whoever waited for others' messages would wait beyond every time-out here.
    limits = Limits(rows=8, linger_s=60.0)
    with (
        serving(engine, limits=limits) as address,
        stream(address) as first,
        stream(address, opened(lane=1)) as second,
    ):
        lanes = [body(first), body(second)]
        for number, lane in enumerate(lanes, start=1):
            assert np.array_equal(lane.forward(states(number), None, keep=True), states(2 * number))
        for number, lane in enumerate(lanes, start=1):
            assert np.array_equal(lane.backward(states(number)), states(2 * number))
    assert engine.passes == [("forward", 1)] * 2 + [("backward", 1)] * 2


def test_a_new_round_forgets_all_lanes_of_the_last() -> None:
    with serving() as address:
        for lane in (0, 1):
            answers(address, pack_message(opened(lane=lane)), FORWARD)
        answers(address, pack_message(opened(round=2)))
        for lane in (0, 1):
            (ready,) = answers(address, pack_message(opened(lane=lane)))
            assert ready.answered == 0


def test_the_certificate_says_who_a_device_is() -> None:
    authority, other = ThrowAway(), ThrowAway()
    secure = authority.server_credentials()
    with serving(credentials=secure) as address:

        def exchanged(who: Any, asked: Open) -> np.ndarray:
            with stream(
                address, asked, credentials=who, server_name="server", attempts=1
            ) as exchange:
                return body(exchange).forward(states(), None, keep=True)

        ada = authority.client_credentials("ada")
        assert np.array_equal(exchanged(ada, opened("ada")), states(2))
        with pytest.raises(SplitError, match="the certificate is of ada, not bob"):
            exchanged(ada, opened("bob"))
        unsigned = grpc.ssl_channel_credentials(authority.certificate)
        pair = other.device("ada")
        of_another = grpc.ssl_channel_credentials(authority.certificate, pair.key, pair.certificate)
        for stranger in (unsigned, of_another, other.client_credentials("ada")):
            with pytest.raises(SplitError, match="could not be reached"):
                exchanged(stranger, opened("ada"))
