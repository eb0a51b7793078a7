# SPDX-License-Identifier: Apache-2.0
"""Flower's own SuperLink and SuperNode, with the gateway and the supervisor between and above."""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from coordinator.gateway.metrics import Metrics
from coordinator.gateway.server import GatewayServer
from coordinator.gateway.settings import GatewaySettings, Hooks
from coordinator.superlink import Nodes, SuperLink
from protocol.node_headers import node_headers, node_public_key

ROOT = Path(__file__).resolve().parents[3]
SUPERVISE = """
import sys
from pathlib import Path
from coordinator.superlink import SuperLink
from coordinator.supervisor import Supervisor
folder, certificates, port = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
superlink = SuperLink(
    folder=folder, port=port, certificate=certificates / "server.pem",
    key=certificates / "server.key", authority=certificates / "ca.pem",
)
superlink.prepare()
Supervisor([superlink.command()], folder / "logs").run()
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def eventually(check: Callable[[], Any], within_s: float = 60.0) -> Any:
    end = time.monotonic() + within_s
    while not (found := check()):
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.3)
    return found


@contextmanager
def running(command: list[str | Path], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command, **options) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


@contextmanager
def gateway(settings: GatewaySettings, hooks: Hooks, metrics: Metrics) -> Iterator[int]:
    up, found = threading.Event(), []

    async def main() -> None:
        down = asyncio.Event()
        async with GatewayServer(settings, hooks, metrics=metrics) as server:
            found.append((server.port, asyncio.get_running_loop(), down))
            up.set()
            await down.wait()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    try:
        assert up.wait(20)
        yield found[0][0]
    finally:
        _, loop, down = found[0]
        loop.call_soon_threadsafe(down.set)
        thread.join(20)
        assert not thread.is_alive()


def saved_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    path.write_bytes(private)
    return key


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.long)])
def test_registered_supernode_comes_online_through_the_gateway_and_nobody_else(
    tmp_path: Path, certificates: Path, killed: bool
) -> None:
    port = free_port()
    superlink = SuperLink(
        folder=tmp_path, port=port, certificate=certificates / "server.pem",
        key=certificates / "server.key", authority=certificates / "ca.pem",
    )  # fmt: skip
    revoked: dict[bytes, str] = {}
    metrics = Metrics()
    settings = GatewaySettings(
        certificate=superlink.certificate, key=superlink.key, upstream_port=port,
        upstream_authority=superlink.authority, host="127.0.0.1", port=0, status_port=0,
    )  # fmt: skip
    hooks = Hooks(
        # Known to the gateway or not: SuperLink has to refuse what is not registered by itself.
        refuse=lambda key: revoked.get(key, ""),
        enroll=bytes, renew=bytes, find_bundle=lambda name: None,
    )  # fmt: skip
    with ExitStack() as stack:
        supervise = [sys.executable, "-c", SUPERVISE, tmp_path, certificates, str(port)]
        supervisor = stack.enter_context(running(supervise, cwd=ROOT))
        public_gateway = stack.enter_context(ExitStack())
        public = public_gateway.enter_context(gateway(settings, hooks, metrics))
        client = stack.enter_context(
            httpx.Client(verify=_trust(certificates), trust_env=False, timeout=30)
        )
        url = f"https://127.0.0.1:{public}"
        eventually(lambda: _answers(port))

        def supernode(name: str) -> subprocess.Popen[bytes]:
            command = [
                Path(sys.executable).with_name("flower-supernode"),
                *("--root-certificates", certificates / "ca.pem"),
                *("--superlink", f"127.0.0.1:{public}", "--port", str(free_port())),
                *("--auth-supernode-private-key", tmp_path / f"{name}.key"),
            ]
            log = stack.enter_context(open(tmp_path / f"{name}.log", "wb"))
            environment = os.environ | superlink.environment()
            return stack.enter_context(
                running(command, stdout=log, stderr=log, env=environment, cwd=tmp_path)
            )

        # A key that nobody registered: SuperNode ends by itself, because it is refused.
        saved_key(tmp_path / "stranger.key")
        refused = supernode("stranger")

        nodes = Nodes(superlink)
        key = saved_key(tmp_path / "node.key")
        registered = node_public_key(key.public_key())
        number = nodes.register(registered, name="ada")
        # Control and runtime requests: SuperLink itself answers them, the gateway has no such path.
        for path in ("/v1/control/start-run", "/v1/control/list-nodes", "/v1/runtime/acquire-task"):
            assert client.post(url + path, content=b"").status_code == 404
        stranger = ec.generate_private_key(ec.SECP384R1())
        answer = client.post(
            url + "/v1/fleet/activate-node",
            headers=_signed(stranger) | {"content-type": "application/x-protobuf"},
        )
        assert answer.status_code >= 400

        known = supernode("node")
        assert refused.wait(60) != 0
        assert "Failed to activate SuperNode" in (tmp_path / "stranger.log").read_text()
        eventually(lambda: [(n.node_id, n.status) for n in nodes.all()] == [(number, "online")])
        assert known.poll() is None

        if killed:
            # SuperLink comes back and still knows the node, which goes on by itself: after a
            # while, for its pauses grow with every try.
            before = eventually(lambda: _pid(tmp_path))
            os.kill(before, signal.SIGKILL)
            eventually(lambda: _pid(tmp_path) not in (None, before) and _answers(port))
            answered = _answered(metrics)
            eventually(lambda: _answered(metrics) > answered + 1)
            assert [node.status for node in nodes.all()] == ["online"]
            assert known.poll() is None

        revoked[registered] = "the device was revoked"
        assert known.wait(60) is not None
        nodes.unregister(number)
        # The gateway is started last and so stopped first: SuperLink waits for its connections.
        public_gateway.close()
        supervisor.terminate()
        assert supervisor.wait(30) == 0
        assert not _answers(port)
        assert "is killed" not in (tmp_path / "logs" / "superlink.log").read_text()


def _answered(metrics: Metrics) -> float:
    """Requests that SuperLink answered through the gateway."""
    labels = {"route": "fleet", "status": "200"}
    return metrics.registry.get_sample_value("fedloom_gateway_requests_total", labels) or 0.0


def _trust(certificates: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificates / "ca.pem"))


def _signed(key: ec.EllipticCurvePrivateKey) -> dict[str, str]:
    return node_headers(key, datetime.datetime.now(datetime.UTC))


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True


def _pid(folder: Path) -> int | None:
    state = json.loads((folder / "logs" / "processes.json").read_text())
    found = state["processes"]["superlink"]["pid"]
    return None if found is None else int(found)
