# SPDX-License-Identifier: Apache-2.0
"""Connections to a split server that stop halfway, and when the server ends them."""

from __future__ import annotations

import selectors
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from protocol.stream import METHOD

Kind = Literal["tcp", "half-tls", "tls", "stream", "upload"]
"""No more than a connection; half of a TLS client's first message; TLS with a member's certificate
and HTTP/2, but no stream; a stream without a message; a frame that is begun and not ended."""
KINDS: Final[tuple[Kind, ...]] = ("stream", "tls", "half-tls", "tcp")
"""Those that should soon be gone, the ones that last longest first."""

_HANDSHAKE_S: Final = 30.0
_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_SETTINGS: Final = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
_UPLOAD: Final = b"\x00\x40\x00\x00\x00\x00\x00\x00\x01" + b"\x00" * 16


@dataclass(slots=True)
class Held:
    """Connections that were opened, and how long each one that has ended had lasted."""

    opened: dict[Kind, int] = field(default_factory=dict)
    lasted: dict[Kind, list[float]] = field(default_factory=dict)
    _all_gone: threading.Event = field(default_factory=threading.Event)

    @property
    def left(self) -> int:
        """Connections that the server has not ended."""
        return sum(self.opened.values()) - sum(map(len, self.lasted.values()))

    def wait(self, seconds: float) -> bool:
        """Until all are gone; whether they are."""
        return self._all_gone.wait(seconds)

    def longest(self, kind: Kind) -> float:
        """Seconds; of a kind that is gone."""
        return max(self.lasted[kind], default=0.0)


@contextmanager
def half_open(
    port: int,
    authority: bytes,
    key: bytes,
    certificate: bytes,
    *,
    count: int,
    kinds: Sequence[Kind] = KINDS,
) -> Iterator[Held]:
    """`count` connections to loopback, as many of each kind, with a client's key and certificate
    and the authority that it trusts, in PEM. None of them answers what the server may ask for."""
    context = ssl.create_default_context(cadata=authority.decode())
    context.check_hostname = False
    context.set_alpn_protocols(["h2"])
    with tempfile.TemporaryDirectory() as folder:
        for name, text in (("key", key), ("certificate", certificate)):
            (Path(folder) / name).write_bytes(text)
        context.load_cert_chain(Path(folder) / "certificate", Path(folder) / "key")
    held, selector, lock = Held(), selectors.DefaultSelector(), threading.Lock()
    over = threading.Event()
    wanted: list[Kind] = [kind for kind in kinds for _ in range(count // len(kinds))]

    def hang(kind: Kind) -> None:
        try:
            opened = _begun(kind, port, context)
        except OSError:
            return  # counted by its absence
        opened.setblocking(False)
        with lock:
            held.opened[kind] = held.opened.get(kind, 0) + 1
            selector.register(opened, selectors.EVENT_READ, (kind, time.monotonic()))

    watching = threading.Thread(
        target=_watch, args=(held, selector, lock, over), name="half-open", daemon=True
    )
    try:
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(hang, wanted))
        watching.start()
        yield held
    finally:
        over.set()
        if watching.ident is not None:
            watching.join()
        for each in list(selector.get_map().values()):
            each.fileobj.close()  # type: ignore[union-attr]
        selector.close()


def _begun(kind: Kind, port: int, context: ssl.SSLContext) -> socket.socket:
    plain = socket.create_connection(("127.0.0.1", port), timeout=_HANDSHAKE_S)
    try:
        if kind == "half-tls":
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            half = context.wrap_bio(incoming, outgoing, server_hostname="server")
            try:
                half.do_handshake()
            except ssl.SSLWantReadError:
                hello = outgoing.read()
            plain.sendall(hello[: len(hello) // 2])
        if kind in ("tcp", "half-tls"):
            return plain
        secure = context.wrap_socket(plain, server_hostname="server")
        frames = _PREFACE + _SETTINGS
        more = {"stream": _headers(), "upload": _UPLOAD}.get(kind, b"")
        secure.sendall(frames + more)
        # What comes back is not read but for its end: the bytes below TLS are enough.
        return socket.socket(fileno=secure.detach())
    except BaseException:
        plain.close()
        raise


def _headers() -> bytes:
    """The frame that opens a gRPC stream of the split server's, every field spelt out (RFC 7541,
    6.2.2)."""
    fields = (
        (b":method", b"POST"),
        (b":scheme", b"https"),
        (b":path", METHOD.encode()),
        (b":authority", b"server"),
        (b"content-type", b"application/grpc"),
        (b"te", b"trailers"),
    )
    block = b"".join(
        b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value for name, value in fields
    )
    end_headers, stream = b"\x04", b"\x00\x00\x00\x01"
    return len(block).to_bytes(3, "big") + b"\x01" + end_headers + stream + block


def _watch(
    held: Held, selector: selectors.BaseSelector, lock: threading.Lock, over: threading.Event
) -> None:
    """Notes every connection's end as it comes."""
    while not over.is_set() and held.left:
        for each, _ in selector.select(0.1):
            one: socket.socket = each.fileobj  # type: ignore[assignment]
            try:
                ended = not one.recv(65_536)
            except BlockingIOError:
                continue
            except OSError:
                ended = True
            if ended:
                kind, begun = each.data
                with lock:
                    selector.unregister(one)
                    held.lasted.setdefault(kind, []).append(time.monotonic() - begun)
                one.close()
    if not held.left:
        held._all_gone.set()
