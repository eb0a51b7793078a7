# SPDX-License-Identifier: Apache-2.0
"""A running deployment: SuperLink on loopback, the gateway before it, and what restarts them.

The gateway, the service of jobs and the split server are processes of their own, `python -m
coordinator.up PART DIR`, which the supervisor of `run_deployment` keeps running beside SuperLink.
Certificates are made at each start.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

from coordinator.deployment import Deployment
from coordinator.enrolment.devices import Device, Devices
from coordinator.errors import DeploymentError, RegistryError, SuperLinkError
from coordinator.gateway.metrics import JobGauges, Metrics
from coordinator.gateway.server import run_gateway
from coordinator.gateway.settings import GatewaySettings, Hooks
from coordinator.jobs.folder import JobFolder
from coordinator.jobs.program import FOLDER_VARIABLE, write_program
from coordinator.jobs.registry import Outcome
from coordinator.jobs.service import serve_jobs
from coordinator.superlink import HOST, Nodes, Runs, SuperLink
from coordinator.supervisor import Command, Supervisor
from protocol.enrolment import Enrolled, unpack_enrolment_answer
from protocol.errors import ContainerError, SignatureError
from protocol.files import result_of
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
    write_program(superlink_programs(folder))
    # The other way round SuperLink would wait for the gateway's connections when it stops.
    Supervisor([superlink.command(), *parts_of(folder)], folder / "logs").run()


def parts_of(folder: Path) -> list[Command]:
    """How what is ours of a deployment is started."""
    return [
        Command(
            name=part,
            argv=[sys.executable, "-m", "coordinator.up", part, str(folder)],
            environment=_ENVIRONMENT.get(part, {}),
        )
        for part in _PARTS
    ]


def superlink_of(deployment: Deployment) -> SuperLink:
    """The deployment's SuperLink."""
    folder, servers = deployment.folder.resolve(), _servers(deployment)
    return SuperLink(
        folder=folder / "superlink",
        port=deployment.settings.superlink_port,
        certificate=servers / "superlink.pem",
        key=servers / "superlink.key",
        authority=servers / "authority.pem",
        programs=superlink_programs(folder),
        variables={FOLDER_VARIABLE: str(folder)},
    )


def superlink_programs(folder: Path) -> Path:
    """Where SuperLink finds the program that plays jobs."""
    return folder / "superlink" / "bin"


def serve_gateway(folder: Path) -> None:
    """The gateway of a deployment, until SIGTERM or SIGINT."""
    with Deployment(folder.resolve()) as deployment:
        superlink, servers = superlink_of(deployment), _servers(deployment)
        register = Registrar(Nodes(superlink), deployment.enrolment.devices)
        settings = GatewaySettings(
            certificate=servers / "gateway.pem",
            key=servers / "gateway.key",
            upstream_port=superlink.port,
            upstream_authority=superlink.authority,
            port=deployment.settings.port,
            status_port=deployment.settings.operator_port,
            status_token=deployment.operator_token(),
        )
        metrics = Metrics()
        metrics.registry.register(JobGauges(partial(spent_by_jobs, deployment.jobs_folder)))
        with register:
            run_gateway(settings, hooks_of(deployment, register), metrics=metrics)


def spent_by_jobs(folder: Path) -> dict[str, Mapping[str, Any]]:
    """What each job of a deployment said last of its privacy; {} for those without."""
    found = {}
    for path in sorted(folder.glob("*/state.json")):
        try:
            found[path.parent.name] = JobFolder(path.parent).state().privacy
        except DeploymentError:
            # Being replaced, or of a job that is being removed: the next look finds it.
            continue
    return found


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
        if entry := deployment.jobs.by_hash(digest):
            return JobFolder(deployment.jobs_folder / entry.name).bundle
        for entry in deployment.jobs.all():
            if entry.outcome is Outcome.FINISHED and result_of(entry.hash) == digest:
                folder = JobFolder(deployment.jobs_folder / entry.name).predict
                return folder if folder.is_dir() else None
        return None

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
    """Sees to it that SuperLink knows every member, and the registry SuperLink's number for it.

    Use as a context manager. What a crash left undone is made up for at the start, and what fails
    is tried again.
    """

    def __init__(self, nodes: Nodes, devices: Devices) -> None:
        self._nodes = nodes
        self._devices = devices
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
                node = self._number(device)
                if node is not None:
                    self._devices.assign_node(device.name, node)
            except (SuperLinkError, RegistryError, OSError) as error:
                # The last two on a full disk, mostly.
                _log.warning("%s: not registered yet: %s", device.name, error)
                self._missing.set()
                return False
            self._known.add(device.name)
            return True

    def _number(self, device: Device) -> int | None:
        """SuperLink's for the device; None where the registry has it. Raises: SuperLinkError."""
        try:
            return self._nodes.register(device.node_key.encode(), name=device.name)
        except SuperLinkError as error:
            if _KNOWN_ALREADY not in str(error):
                raise
        if device.node is not None:
            return None
        # A crash came between SuperLink's answer and our note of it. Devices are registered one by
        # one, so there is one node that nobody has, and one device that has none.
        others = {each.node for each in self._devices.all() if each.node is not None}
        free = [node.node_id for node in self._nodes.all() if str(node.node_id) not in others]
        if len(free) != 1:
            _log.error(
                "%s: SuperLink knows it under a number that cannot be told from %d others; it "
                "takes part in no job until it leaves and enrols again", device.name, len(free),
            )  # fmt: skip
            return None
        return free[0]

    def _keep_up(self) -> None:
        while True:
            self._missing.wait()
            self._missing.clear()
            if self._stop.is_set():
                return
            try:
                members = [each for each in self._devices.all() if each.revoked is None]
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


def _serve_jobs(folder: Path) -> None:
    def start_for(deployment: Deployment) -> Callable[[str], object]:
        return Runs(superlink_of(deployment)).start

    serve_jobs(folder.resolve(), start_for)


def _serve_split(folder: Path) -> None:
    # Imported here: the gateway and the jobs do without gRPC and onnxruntime.
    from coordinator.jobs.split import serve_split

    servers = folder.resolve() / "server"
    serve_split(folder.resolve(), servers / "gateway.pem", servers / "gateway.key")


_PARTS: Final[Mapping[str, Callable[[Path], None]]] = {
    "gateway": serve_gateway,
    "jobs": _serve_jobs,
    "split": _serve_split,
}

# gRPC's Python knows no setting for versions of TLS, and takes 1.2 as well. The ciphers that this
# names are those of 1.2 alone: the one that is left there wants an RSA certificate, and ours are of
# another kind. It is read when gRPC is loaded, so it has to stand in the process's environment.
_ENVIRONMENT: Final[Mapping[str, Mapping[str, str]]] = {
    "split": {"GRPC_SSL_CIPHER_SUITES": "ECDHE-RSA-AES256-GCM-SHA384"},
}

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    _PARTS[sys.argv[1]](Path(sys.argv[2]))
