# SPDX-License-Identifier: Apache-2.0
"""A deployment's gateway in a process of its own, and beside it something in SuperLink's place that
answers at once: what is measured is the gateway, its registry and TLS."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from client_sdk.identity import Identity
from coordinator.deployment import Deployment
from simulations.benchmarks.deployed import HOST, free_settings

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

_START_S: Final = 60.0
_STOP_S: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A gateway that is up, and the keys of its members."""

    port: int
    authority: str  # PEM
    keys: Sequence[ec.EllipticCurvePrivateKey]
    process: int  # the gateway's

    def cpu_s(self) -> float:
        """Processor time that the gateway has used."""
        stat = Path(f"/proc/{self.process}/stat").read_text(encoding="utf-8")
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@contextmanager
def serving(devices: int, *, answer_bytes: int = 64) -> Iterator[Served]:
    """A real deployment of so many members; SuperLink's stand-in answers so many bytes."""
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        settings = free_settings()
        folder = Path(place) / "deployment"
        with Deployment.create(folder, settings) as deployment:
            keys = list(_enrolled(deployment, Path(place), devices))
            authority = deployment.authority.pem
            _write_certificates(deployment)
        # Fresh processes: neither shares an event loop or a lock with this one.
        context = multiprocessing.get_context("spawn")
        for target, arguments in (
            (_serve_superlink, (folder, settings.superlink_port, answer_bytes)),
            (_serve_gateway, (folder,)),
        ):
            process = context.Process(target=target, args=arguments, daemon=True)
            process.start()
            stack.callback(_end, process)
        for each in (settings.superlink_port, settings.port):
            _wait_for(each)
        # The gateway was started last.
        yield Served(port=settings.port, authority=authority, keys=keys, process=process.pid or 0)


def _enrolled(
    deployment: Deployment, place: Path, devices: int
) -> Iterator[ec.EllipticCurvePrivateKey]:
    """Members of the registry, by their keys; of nobody's SuperLink."""
    token = deployment.enrolment.create_token("bench", quota=devices)
    fingerprint = deployment.authority.fingerprint
    for number in range(devices):
        identity = Identity(place / f"device-{number}")
        identity.join(
            deployment.enrolment.enrol(identity.enrol_request(token)), fingerprint=fingerprint
        )
        yield identity.key()


def _write_certificates(deployment: Deployment) -> None:
    """As `coordinator.up` does at each start."""
    folder = deployment.folder / "server"
    folder.mkdir()
    for name in ("gateway", "superlink"):
        issued = deployment.authority.server((HOST,))
        (folder / f"{name}.key").write_bytes(issued.key)
        (folder / f"{name}.pem").write_bytes(issued.certificate)
    (folder / "authority.pem").write_text(deployment.authority.pem, encoding="ascii")


def _serve_gateway(folder: Path) -> None:
    """As `coordinator.up.serve_gateway`, but that nobody is registered with a SuperLink."""
    from coordinator.gateway.server import run_gateway
    from coordinator.gateway.settings import GatewaySettings
    from coordinator.superlink import Nodes
    from coordinator.up import Registrar, hooks_of, superlink_of

    with Deployment(folder) as deployment:
        superlink, servers = superlink_of(deployment), folder / "server"
        settings = GatewaySettings(
            certificate=servers / "gateway.pem",
            key=servers / "gateway.key",
            upstream_port=superlink.port,
            upstream_authority=superlink.authority,
            host=HOST,
            port=deployment.settings.port,
            status_port=deployment.settings.operator_port,
        )
        devices = deployment.enrolment.devices
        run_gateway(settings, hooks_of(deployment, Registrar(Nodes(superlink), devices)))


def _serve_superlink(folder: Path, port: int, answer_bytes: int) -> None:
    import uvicorn

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        headers = [(b"content-length", str(answer_bytes).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": bytes(answer_bytes)})

    servers = folder / "server"
    uvicorn.run(
        app,
        host=HOST,
        port=port,
        lifespan="off",
        log_config=None,
        access_log=False,
        ssl_certfile=servers / "superlink.pem",
        ssl_keyfile=servers / "superlink.key",
    )


def _wait_for(port: int) -> None:
    async def look() -> None:
        async with asyncio.timeout(_START_S):
            while True:
                try:
                    _, writer = await asyncio.open_connection(HOST, port)
                except OSError:
                    await asyncio.sleep(0.05)
                else:
                    writer.close()
                    return

    asyncio.run(look())


def _end(process: Any) -> None:
    process.terminate()
    process.join(_STOP_S)
    if process.is_alive():
        process.kill()
        process.join()
