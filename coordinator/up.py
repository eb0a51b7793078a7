# SPDX-License-Identifier: Apache-2.0
"""A running deployment: SuperLink on loopback, the gateway before it, and what restarts them.

The gateway is a process of its own, `python -m coordinator.up DIR`, which the supervisor of
`run_deployment` keeps running beside SuperLink. Certificates of both are made at each start.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from coordinator.deployment import Deployment
from coordinator.enrolment.devices import Device
from coordinator.errors import RegistryError, SuperLinkError
from coordinator.gateway.server import run_gateway
from coordinator.gateway.settings import GatewaySettings, Hooks
from coordinator.superlink import HOST, Nodes, SuperLink
from coordinator.supervisor import Command, Supervisor
from protocol.enrolment import Enrolled, unpack_enrolment_answer
from protocol.errors import ContainerError, SignatureError
from protocol.keys import key_fingerprint, load_public
from protocol.owned_files import PUBLIC, write_whole

_KNOWN_ALREADY: Final = "[code: 23]"  # Flower's word for a key that is registered
_REGISTER_AGAIN_S: Final = 5.0

_log = logging.getLogger(__name__)


def run_deployment(folder: Path) -> None:
    """Keeps a deployment's processes running, until SIGTERM or SIGINT; from the main thread.

    Raises: DeploymentError and what else opening it raises, SuperLinkError, SupervisorError.
    """
    folder = folder.resolve()
    with Deployment(folder) as deployment:
        superlink = superlink_of(deployment)
        _write_server(deployment, "superlink", (HOST, "localhost"))
        _write_server(deployment, "gateway", deployment.settings.addresses)
    superlink.prepare()
    gateway = Command(name="gateway", argv=[sys.executable, "-m", "coordinator.up", str(folder)])
    # The other way round SuperLink would wait for the gateway's connections when it stops.
    Supervisor([superlink.command(), gateway], folder / "logs").run()


def superlink_of(deployment: Deployment) -> SuperLink:
    """The deployment's SuperLink."""
    folder, servers = deployment.folder.resolve(), _servers(deployment)
    return SuperLink(
        folder=folder / "superlink",
        port=deployment.settings.superlink_port,
        certificate=servers / "superlink.pem",
        key=servers / "superlink.key",
        authority=servers / "authority.pem",
    )


def serve_gateway(folder: Path) -> None:
    """The gateway of a deployment, until SIGTERM or SIGINT."""
    with Deployment(folder.resolve()) as deployment:
        superlink, servers = superlink_of(deployment), _servers(deployment)
        register = Registrar(Nodes(superlink), deployment.enrolment.devices.all)
        settings = GatewaySettings(
            certificate=servers / "gateway.pem",
            key=servers / "gateway.key",
            upstream_port=superlink.port,
            upstream_authority=superlink.authority,
            port=deployment.settings.port,
            status_port=deployment.settings.operator_port,
            status_token=deployment.operator_token(),
        )
        with register:
            run_gateway(settings, hooks_of(deployment, register))


def hooks_of(deployment: Deployment, register: Registrar) -> Hooks:
    """What the gateway asks of the registry."""
    enrolment = deployment.enrolment

    def device_of(public_key: bytes) -> Device | None:
        try:
            key = load_public(public_key.decode("ascii", "replace"))
        except SignatureError:
            return None
        return enrolment.devices.by_node(key_fingerprint(key))

    def refuse(public_key: bytes) -> str:
        device = device_of(public_key)
        if device is None:
            return "this device is no member; enrol it with a token"
        return "" if device.revoked is None else "this device was revoked"

    def enroll(request: bytes) -> bytes:
        answer = enrolment.enrol(request)
        try:
            made = unpack_enrolment_answer(answer)
        except ContainerError:
            return answer
        if isinstance(made, Enrolled) and (device := enrolment.devices.by_name(made.device)):
            # Before the device hears of it: a SuperNode whose key is unknown ends itself.
            register.now(device)
        return answer

    def find_bundle(digest: str) -> Path | None:
        folder = deployment.folder / "bundles" / digest
        return folder if folder.is_dir() else None

    def seen(public_key: bytes, received: int, sent: int) -> None:
        if device := device_of(public_key):
            enrolment.devices.note(device.name, bytes_up=received, bytes_down=sent)

    return Hooks(
        refuse=refuse,
        enroll=enroll,
        renew=enrolment.renew,
        find_bundle=find_bundle,
        authority=deployment.authority.pem.encode(),
        seen=seen,
    )


class Registrar:
    """Sees to it that SuperLink knows every member. Use as a context manager.

    What a crash left undone is made up for at the start, and what fails is tried again.
    """

    def __init__(self, nodes: Nodes, members: Callable[[], list[Device]]) -> None:
        self._nodes = nodes
        self._members = members
        self._known: set[str] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._missing = threading.Event()
        self._thread = threading.Thread(target=self._keep_up, name="registrar", daemon=True)

    def __enter__(self) -> Registrar:
        self._missing.set()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._missing.set()
        self._thread.join()

    def now(self, device: Device) -> bool:
        """Whether SuperLink knows the device; where not, it will be told again."""
        with self._lock:
            if device.name in self._known:
                return True
            try:
                self._nodes.register(device.node_key.encode(), name=device.name)
            except SuperLinkError as error:
                if _KNOWN_ALREADY not in str(error):
                    _log.warning("%s: not registered yet: %s", device.name, error)
                    self._missing.set()
                    return False
            self._known.add(device.name)
            return True

    def _keep_up(self) -> None:
        while True:
            self._missing.wait()
            self._missing.clear()
            if self._stop.is_set():
                return
            try:
                members = [each for each in self._members() if each.revoked is None]
            except RegistryError:
                _log.exception("the registry cannot be read; it is tried again")
                self._missing.set()
                members = []
            for device in members:
                if self._stop.is_set():
                    return
                self.now(device)
            if self._missing.is_set():
                self._stop.wait(_REGISTER_AGAIN_S)


def _servers(deployment: Deployment) -> Path:
    return deployment.folder.resolve() / "server"


def _write_server(deployment: Deployment, name: str, addresses: tuple[str, ...]) -> None:
    folder = _servers(deployment)
    folder.mkdir(mode=0o700, exist_ok=True)
    issued = deployment.authority.server(addresses)
    write_whole(folder / f"{name}.key", issued.key)
    write_whole(folder / f"{name}.pem", issued.certificate, mode=PUBLIC)
    write_whole(folder / "authority.pem", deployment.authority.pem.encode(), mode=PUBLIC)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    serve_gateway(Path(sys.argv[1]))
