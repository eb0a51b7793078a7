# SPDX-License-Identifier: Apache-2.0
"""The split server's port and those who may not in, who speak another TLS, or who never go on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from client_sdk.errors import SplitError
from client_sdk.split_body import RemoteBody
from client_sdk.split_stream import SplitStream
from coordinator.split_server import Limits, SplitServer
from coordinator.up import parts_of
from protocol.split import SplitSpec, largest_message
from protocol.stream import Open
from simulations.benchmarks.half_open import KINDS, half_open
from simulations.benchmarks.split_load import half_open_p99_ms
from simulations.progress import SilentProgress
from simulations.throwaway import ThrowAway

SPEC = SplitSpec(entering_tokens=3, leaving_tokens=3, width=4)
DAY = 86_400
ROOT = Path(__file__).parents[2]


class Doubling:
    """out = 2 * in."""

    def forward(self, entering: Any, masks: Any, *, keep: bool) -> list[tuple[np.ndarray, Any]]:
        return [(2 * states, None) for states in entering]

    def backward(self, returning: Any) -> list[np.ndarray]:
        return [2 * gradient for _, gradient in returning]


def serve(folder: Path, limits: Limits) -> None:
    """The process of a split server, with the keys in a folder, until its input ends."""
    key, certificate, root = [(folder / name).read_bytes() for name in ("key", "pem", "root")]

    async def run() -> None:
        credentials = grpc.ssl_server_credentials([(key, certificate)], root, True)
        server = SplitServer(Doubling(), SPEC, lambda opened: "", limits, credentials=credentials)
        async with server:
            print(server.port, flush=True)
            await asyncio.to_thread(sys.stdin.read)

    asyncio.run(run())


@pytest.fixture
def authority() -> ThrowAway:
    return ThrowAway()


@pytest.fixture
def served(tmp_path: Path, authority: ThrowAway) -> Iterator[Callable[..., int]]:
    """`served(limits)`: the port of a server that a deployment's supervisor would start."""
    issued = authority.server()
    for name, content in (
        ("key", issued.key), ("pem", issued.certificate), ("root", authority.certificate)
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
    (split,) = [part for part in parts_of(tmp_path) if part.name == "split"]
    with contextlib.ExitStack() as stack:

        def start(limits: Limits | None = None) -> int:
            words = json.dumps(asdict(limits or Limits(rows=8)))
            process = subprocess.Popen(
                [sys.executable, __file__, str(tmp_path), words],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT,
                env={**os.environ, **split.environment, "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
            stack.enter_context(process)
            assert process.stdout is not None
            return int(process.stdout.readline())

        yield start


def forward(port: int, credentials: grpc.ChannelCredentials) -> np.ndarray:
    most = largest_message(SPEC, 8)
    opened = Open(job="c" * 64, round=1, client="ada", nonce="ab" * 8, lane=0)
    with SplitStream(
        f"127.0.0.1:{port}", opened, max_bytes=most, credentials=credentials, server_name="server",
        attempts=1, timeout_s=10.0,
    ) as stream:  # fmt: skip
        states = np.ones((2, 3, 4), np.float32)
        return RemoteBody(SPEC, stream, max_bytes=most).forward(states, None, keep=False)


def test_only_a_members_certificate_of_now_gets_in(
    served: Callable[..., int], authority: ThrowAway
) -> None:
    port, root = served(), authority.certificate
    assert np.array_equal(forward(port, authority.client_credentials("ada")), np.full((2, 3, 4), 2))
    of_another = ThrowAway().device("ada")
    # Signed by the same authority a fortnight ago, for a week.
    authority._authority._now = lambda: time.time() - 14 * DAY
    expired = authority.device("ada")
    for refused in (
        grpc.ssl_channel_credentials(root),
        grpc.ssl_channel_credentials(root, of_another.key, of_another.certificate),
        grpc.ssl_channel_credentials(root, expired.key, expired.certificate),
    ):
        with pytest.raises(SplitError, match="could not be reached"):
            forward(port, refused)


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_tls_is_1_3_and_no_other(
    served: Callable[..., int], authority: ThrowAway, tmp_path: Path
) -> None:
    port, member = served(), authority.device("ada")
    (tmp_path / "member").write_bytes(member.key + member.certificate)
    for version in (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2):
        with pytest.raises(OSError, match=r"SSL|reset|EOF"):
            shaken(port, authority, tmp_path / "member", version)
    assert shaken(port, authority, tmp_path / "member", ssl.TLSVersion.TLSv1_3) == "TLSv1.3"


def shaken(port: int, authority: ThrowAway, member: Path, version: ssl.TLSVersion) -> str | None:
    """What was agreed on with a client that speaks one version alone."""
    context = ssl.create_default_context(cadata=authority.certificate.decode())
    context.check_hostname = False
    context.set_alpn_protocols(["h2"])
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    context.load_cert_chain(member)
    context.minimum_version = context.maximum_version = version
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="server") as secure,
    ):
        return secure.version()


def test_half_open_connections_are_ended_and_hold_up_nobody(
    served: Callable[..., int], authority: ThrowAway
) -> None:
    port = served(Limits(rows=8, handshake_s=3.0, idle_s=2.0, open_s=2.0))
    ada, mallory = authority.client_credentials("ada"), authority.device("mallory")
    with half_open(port, authority.certificate, mallory.key, mallory.certificate, count=40) as held:
        assert held.opened == dict.fromkeys(KINDS, 10)
        began = time.monotonic()
        assert np.array_equal(forward(port, ada), np.full((2, 3, 4), 2))
        assert time.monotonic() - began < 2.0, "an honest device waits for none of them"
        assert held.wait(15), f"{held.left} are still there"
        assert {kind: len(seconds) for kind, seconds in held.lasted.items()} == held.opened


@pytest.mark.long
def test_a_thousand_half_open_connections_hold_up_nobody(
    cache_of_the_session: Path, record_property: Callable[[str, object], None]
) -> None:
    made = half_open_p99_ms(SilentProgress())
    record_property(made.name, made.value)
    print(f"{made.name}: {made.value:.1f} {made.unit}; {made.note}")
    assert made.holds, made


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Limits(**json.loads(sys.argv[2])))
