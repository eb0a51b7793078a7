# SPDX-License-Identifier: Apache-2.0
"""The mistakes that show on the coordinator's side, from its folder and its ports."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import ssl
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fedloom.doctor.check import Check, State
from fedloom.doctor.files import check_disk, check_files, flower_fault, flower_version
from fedloom.doctor.mistakes import Side, fail, warn, well

if TYPE_CHECKING:
    from coordinator.deployment import Deployment, Settings

_SIDE: Final[Side] = "coordinator"
_LOOPBACK: Final = "127.0.0.1"
_OFTEN: Final = 3  # restarts of a part since the deployment was started
_SOON_S: Final = 30 * 86_400
_TIMEOUT_S: Final = 5.0
_MAX_STATE_BYTES: Final = 64 << 10
_TAIL_BYTES: Final = 4_000


def examine_coordinator(folder: Path) -> list[Check]:
    """Mistakes 1 to 7, as far as the folder can be read."""
    folder = folder.expanduser().absolute()
    setup = _setup(folder)
    if not folder.is_dir():
        return [setup]
    private = [
        folder / name for name in ("signing.pem", "operator.token", "registry.sqlite")
    ] + sorted(folder.glob("*/*.key"))
    checks = [setup, check_files(_SIDE, folder, private), check_disk(_SIDE, folder)]
    if any(check.state is State.FAIL for check in checks[:2]):
        return checks  # nothing of it can be opened
    from coordinator.deployment import Deployment
    from coordinator.errors import CoordinatorError
    from protocol.errors import SignatureError

    try:
        with Deployment(folder) as deployment:
            parts = _Parts.read(folder)
            checks += [
                _versions(deployment),
                _running(folder, parts),
                _ports(deployment, parts),
                _address(deployment),
            ]
    except (CoordinatorError, SignatureError) as error:
        checks[0] = fail(_SIDE, 1, str(error), "mend that, or restore the folder from its backup")
    return checks


def _setup(folder: Path) -> Check:
    """Mistake 1: `init` was not run, or was cut off."""
    again = f"fedloom coordinator init {folder} --name NAME --address HOST"
    if not folder.is_dir():
        return fail(_SIDE, 1, f"{folder}: expected a deployment, found no folder", again)
    if (folder / "deployment.toml").exists():
        return well(_SIDE, 1, f"{folder} is a whole deployment")
    if (folder / "authority").exists():
        found = f"{folder}: init was cut off before it wrote deployment.toml"
        return fail(_SIDE, 1, found, f"run it again, it goes on: {again}")
    return fail(_SIDE, 1, f"{folder}: expected a deployment, found another folder", again)


def _versions(deployment: Deployment) -> Check:
    """Mistake 4: Flower outside its bounds, here or on a device, or a device of another release."""
    from fedloom import __version__

    here = flower_version()
    if fault := flower_fault(here):
        return fail(
            _SIDE, 4, f"{fault} here", "pip install -c constraints.txt 'fedloom[coordinator]'"
        )
    others, members = [], 0
    for device in deployment.enrolment.devices.all():
        told = device.versions
        if device.revoked is not None or not told:
            continue
        members += 1
        if _release(told.get("fedloom", "")) != _release(__version__):
            others.append(f"{device.name} has fedloom {told.get('fedloom', 'none')}")
        elif fault := flower_fault(told.get("flwr", "none")):
            others.append(f"{device.name} has {fault}")
    if others:
        found = f"{'; '.join(others[:3])}; as {len(others)} of {members} said when they enrolled"
        mend = f"install fedloom[device] {__version__} there; to have it noted, enrol them again"
        return warn(_SIDE, 4, found, mend)
    return well(_SIDE, 4, f"fedloom {__version__} and flwr {here}, {members} devices alike")


def _release(version: str) -> tuple[str, ...]:
    return tuple(version.split(".")[:2])


@dataclass(frozen=True, slots=True)
class _Parts:
    """What `logs/processes.json` says, and whether it still holds."""

    running: bool
    processes: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> _Parts:
        try:
            raw = (folder / "logs" / "processes.json").read_bytes()[:_MAX_STATE_BYTES]
            found = json.loads(raw)
            processes, supervisor = dict(found["processes"]), int(found["supervisor"])
        except (OSError, ValueError, KeyError, TypeError):
            return cls(False, {})
        # By its children: the supervisor's own number may be another process's by now.
        theirs = [_parent(part["pid"]) for part in processes.values() if part.get("pid")]
        return cls(supervisor in theirs, processes)


def _running(folder: Path, parts: _Parts) -> Check:
    """Mistake 5: nothing runs, or a part of it does not stay up."""
    if not parts.running:
        return warn(_SIDE, 5, "the deployment is not running", f"fedloom coordinator up {folder}")
    for name, part in parts.processes.items():
        if part.get("pid") is None or _parent(part["pid"]) is None:
            found = f"{name} is down after {part['restarts']} restarts: {_last(folder, name)}"
            return fail(_SIDE, 5, found, f"see {folder / 'logs' / name}.log")
        if part["restarts"] >= _OFTEN:
            found = f"{name} was restarted {part['restarts']} times: {_last(folder, name)}"
            return warn(_SIDE, 5, found, f"see {folder / 'logs' / name}.log")
    return well(_SIDE, 5, f"{', '.join(parts.processes)} are up")


def _last(folder: Path, name: str) -> str:
    """The last line that a part itself printed."""
    try:
        with (folder / "logs" / f"{name}.log").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return "it left no log"
    own = [line.strip() for line in lines if line.strip() and " supervisor: " not in line]
    return own[-1][:300] if own else "it printed nothing"


def _ports(deployment: Deployment, parts: _Parts) -> Check:
    """Mistake 6: a port is taken by another process, or nobody answers at it."""
    settings = deployment.settings
    if parts.running:
        return _answering(deployment, settings)
    for name, host, port in (
        ("port", "0.0.0.0", settings.port),
        ("split_port", "0.0.0.0", settings.split_port),
        ("operator_port", _LOOPBACK, settings.operator_port),
        ("superlink_port", _LOOPBACK, settings.superlink_port),
    ):
        with socket.socket() as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                one.bind((host, port))
            except OSError as error:
                taken = error.errno == errno.EADDRINUSE
                why = "another process has it" if taken else (error.strerror or "no word why")
                mend = (
                    f"see who has it with: ss -ltnp 'sport = :{port}'; stop that, or give {name} "
                    f"another number in {deployment.folder / 'deployment.toml'}"
                )
                return fail(_SIDE, 6, f"{name} {port} cannot be listened on: {why}", mend)
    return well(_SIDE, 6, "all four ports are free for the deployment")


def _answering(deployment: Deployment, settings: Settings) -> Check:
    mend = f"see {deployment.folder / 'logs' / 'gateway.log'} and superlink.log there"
    url = f"http://{_LOOPBACK}:{settings.operator_port}/healthz"
    # A proxy of the environment has no business between two processes of one machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_TIMEOUT_S) as answer:
            answer.read(100)
    except OSError as error:
        return fail(_SIDE, 6, f"operator_port {settings.operator_port}: {error}", mend)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=deployment.authority.pem)
    context.check_hostname = False
    try:
        with (
            socket.create_connection((_LOOPBACK, settings.port), timeout=_TIMEOUT_S) as plain,
            context.wrap_socket(plain),
        ):
            pass
    except ssl.SSLError as error:
        found = f"port {settings.port}: another process than the gateway answers ({error.reason})"
        return fail(_SIDE, 6, found, f"ss -ltnp 'sport = :{settings.port}' says which; stop it")
    except OSError as error:
        return fail(_SIDE, 6, f"port {settings.port}: {error}", mend)
    return well(_SIDE, 6, f"the gateway answers on {settings.port} and is healthy")


def _address(deployment: Deployment) -> Check:
    """Mistake 7: the certificate names other addresses than devices use, or ends."""
    from cryptography import x509

    addresses, path = deployment.settings.addresses, deployment.folder / "server" / "gateway.pem"
    restart = "start the deployment again: certificates are made at each start"
    if path.exists():
        try:
            made = x509.load_pem_x509_certificate(path.read_bytes())
        except (OSError, ValueError) as error:
            return fail(_SIDE, 7, f"{path}: expected a certificate ({error})", restart)
        names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        named = {str(name.value) for name in names}
        if lacking := [address for address in addresses if address not in named]:
            found = f"the certificate names {', '.join(sorted(named))}, not {', '.join(lacking)}"
            return fail(_SIDE, 7, found, restart)
        if made.not_valid_after_utc.timestamp() < time.time() + _SOON_S:
            found = f"the gateway's certificate ends {made.not_valid_after_utc:%Y-%m-%d}"
            return warn(_SIDE, 7, found, restart)
    if lost := [address for address in addresses if _not_here(address)]:
        found = f"{', '.join(lost)}: expected an address of this machine, it has none such"
        mend = (
            "if this machine's address changed, put the new one into addresses in "
            f"{deployment.folder / 'deployment.toml'} and start it again; nothing, if it is "
            "forwarded here"
        )
        return warn(_SIDE, 7, found, mend)
    return well(_SIDE, 7, f"devices use {', '.join(addresses)}, and the certificate names them")


def _not_here(address: str) -> bool:
    """Whether a name leads nowhere, or an IP address is none of this machine's."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(address, 0, type=socket.SOCK_DGRAM)[0]
    except OSError:
        return True
    with contextlib.suppress(ValueError):
        import ipaddress

        ipaddress.ip_address(address)
        with socket.socket(family, kind, protocol) as one:
            try:
                one.bind(place)
            except OSError as error:
                return error.errno == errno.EADDRNOTAVAIL
    return False


def _parent(pid: int) -> int | None:
    """Whose child a process is; None where there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else int(fields[1])
