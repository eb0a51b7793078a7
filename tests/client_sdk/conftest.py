# SPDX-License-Identifier: Apache-2.0
"""A coordinator that devices can reach: the real gateway and registry on a port of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from client_sdk.device import Device
from client_sdk.gateway import Address, Gateway
from client_sdk.identity import Identity
from coordinator.deployment import Deployment, Settings
from coordinator.gateway.server import GatewayServer
from coordinator.gateway.settings import GatewayLimits, GatewaySettings
from coordinator.up import hooks_of


class _NoSuperLink:
    def now(self, device: Any) -> bool:
        return True


@dataclass
class Served:
    """A deployment whose gateway is up; nothing is behind it."""

    deployment: Deployment
    address: Address

    @property
    def url(self) -> str:
        return str(self.address)

    def enrolled(self, folder: Path) -> Device:
        return Device.enroll(
            coordinator=self.url,
            token=self.deployment.enrolment.create_token("bed"),
            fingerprint=self.deployment.authority.fingerprint,
            folder=folder,
        )

    def gateway(self, device: Device, **options: Any) -> Gateway:
        held = device.membership
        assert held is not None
        key = Identity(device.home.folder).key()
        return Gateway(options.pop("address", self.address), held.authority, key, **options)

    def offer(self, made: Any) -> str:
        """A compiled job's bundle, signed by this deployment; its hash."""
        from coordinator.bundles import write_bundle

        job: str = made.bundle.manifest.job
        folder = self.bundle_folder(job)
        if self.deployment.jobs.by_hash(job) is None:
            self.deployment.jobs.add(job, job)
        names = made.bundle.manifest.class_names
        key = self.deployment.signing_key
        split = made.bundle.manifest.split
        write_bundle(made.job, made.recipe, made.compiled, names, key, folder, split=split)
        return job

    def bundle_folder(self, job: str) -> Path:
        return self.deployment.jobs_folder / job / "bundle"


Serve = Callable[..., Served]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """`serve(now=time.time, limits=...)` starts one; it lasts as long as the test."""
    with contextlib.ExitStack() as stack:

        def start(
            now: Callable[[], float] = time.time, limits: GatewayLimits | None = None
        ) -> Served:
            return stack.enter_context(_serving(tmp_path / "deployment", now, limits))

        yield start


@pytest.fixture
def served(serve: Serve) -> Served:
    return serve()


@contextlib.contextmanager
def _serving(
    folder: Path, now: Callable[[], float], limits: GatewayLimits | None
) -> Iterator[Served]:
    settings = Settings(name="ward", addresses=("127.0.0.1",))
    with Deployment.create(folder, settings, now=now) as deployment:
        issued = deployment.authority.server(("127.0.0.1",))
        for name, content in (
            ("server.pem", issued.certificate),
            ("server.key", issued.key),
            ("authority.pem", deployment.authority.pem.encode()),
        ):
            (folder / name).write_bytes(content)
        gateway = GatewaySettings(
            certificate=folder / "server.pem", key=folder / "server.key", upstream_port=1,
            upstream_authority=folder / "authority.pem", host="127.0.0.1", port=0, status_port=0,
            limits=limits or GatewayLimits(enrolments_burst=1_000),
        )  # fmt: skip
        hooks = hooks_of(deployment, _NoSuperLink())  # type: ignore[arg-type]
        up, found = threading.Event(), []

        async def main() -> None:
            down = asyncio.Event()
            async with GatewayServer(gateway, hooks) as server:
                found.append((server.port, asyncio.get_running_loop(), down))
                up.set()
                await down.wait()

        thread = threading.Thread(target=lambda: asyncio.run(main()))
        thread.start()
        try:
            assert up.wait(20)
            # What was signed before the gateway's start would be asked to come again.
            time.sleep(0.01)
            yield Served(deployment, Address("127.0.0.1", found[0][0]))
        finally:
            _, loop, down = found[0]
            loop.call_soon_threadsafe(down.set)
            thread.join(20)
            assert not thread.is_alive()


class CuttingProxy:
    """Passes bytes on to a port, and breaks connections off after so many towards the device.

    `cuts` are used up, a connection each; with none left connections are whole.
    """

    def __init__(self, port: int, cuts: list[int]) -> None:
        self.cuts = cuts
        self.connections = 0
        self.passed = 0  # bytes towards the device
        self._port = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = Address("127.0.0.1", self._listening.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                device, _ = self._listening.accept()
                self.connections += 1
                most = self.cuts.pop(0) if self.cuts else 1 << 40
                threading.Thread(target=self._carry, args=(device, most), daemon=True).start()

    def _carry(self, device: socket.socket, most: int) -> None:
        with device, socket.create_connection(("127.0.0.1", self._port)) as gateway:
            threading.Thread(target=_pump, args=(device, gateway), daemon=True).start()
            with contextlib.suppress(OSError):
                while most > 0 and (data := gateway.recv(min(65_536, most))):
                    device.sendall(data)
                    most -= len(data)
                    self.passed += len(data)
            for end in (device, gateway):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65_536):
            target.sendall(data)


@pytest.fixture
def cutting(served: Served) -> Iterator[Callable[[list[int]], CuttingProxy]]:
    """`cutting([n, ...])` stands before the gateway."""
    with contextlib.ExitStack() as stack:

        def start(cuts: list[int]) -> CuttingProxy:
            proxy = CuttingProxy(served.address.port, cuts)
            stack.callback(proxy.close)
            return proxy

        yield start
