# SPDX-License-Identifier: Apache-2.0
"""The folder of one deployment: its keys, its settings, and who is a member.

    FOLDER/
    ├── deployment.toml   name, addresses and ports; written last: a folder that has it is whole
    ├── authority/        the certificate authority
    ├── signing.pem       Ed25519, what bundles are signed with
    ├── operator.token    who reads metrics shows it
    ├── registry.sqlite   tokens, devices, jobs, audit log
    ├── jobs/              a folder for each, see `coordinator.jobs.folder`
    ├── server/           keys and certificates of the ports, made anew at each start
    ├── superlink/        Flower's own state
    └── logs/             of the processes, and what is running

All of it is its owner's alone. A backup is a copy of the folder while nothing runs in it.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import re
import secrets
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from coordinator.enrolment.authority import CERTIFICATE_FILE, Authority, plain_label
from coordinator.enrolment.service import Enrolment
from coordinator.enrolment.store import Store
from coordinator.errors import DeploymentError
from coordinator.jobs.registry import Jobs
from coordinator.toml_text import toml_value
from protocol.owned_files import PUBLIC, read_private, write_whole
from protocol.signing import load_private_key, new_key, public_key_hex, save_private_key

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SETTINGS_FILE: Final = "deployment.toml"
_AUTHORITY: Final = "authority"
_SIGNING_KEY: Final = "signing.pem"
_OPERATOR_TOKEN: Final = "operator.token"
_REGISTRY: Final = "registry.sqlite"
_JOBS: Final = "jobs"
_HOST_NAME: Final = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9-]+)*")
_MAX_TOKEN_BYTES: Final = 1_000
_MAX_SETTINGS_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What an operator decides; `deployment.toml`."""

    name: str
    """Of the coordinator, which devices pin."""
    addresses: tuple[str, ...]
    """DNS names and IP addresses under which devices reach it; its certificates name them."""
    port: int = 8443
    """The one that devices need: Flower, enrolment and bundles."""
    split_port: int = 8444
    """Of the split server, where a job has one."""
    operator_port: int = 9443
    """On loopback: health and metrics."""
    superlink_port: int = 9092
    """On loopback: Flower's own server, which nobody but the gateway talks to."""

    def __post_init__(self) -> None:
        plain_label("name", self.name)
        if not self.addresses:
            raise DeploymentError(
                "addresses: expected at least one name or IP address under which devices reach "
                "the coordinator, found none"
            )
        for address in self.addresses:
            if not _is_ip(address) and not _HOST_NAME.fullmatch(address):
                raise DeploymentError(
                    f"addresses: expected DNS names in lower case or IP addresses, found "
                    f'"{address}"'
                )
        names = ("port", "split_port", "operator_port", "superlink_port")
        ports = {name: getattr(self, name) for name in names}
        for name, port in ports.items():
            if isinstance(port, bool) or not isinstance(port, int) or not 1 <= port <= 65_535:
                raise DeploymentError(f"{name}: expected a port from 1 to 65535, found {port}")
        if len(set(ports.values())) < len(ports):
            raise DeploymentError(f"ports: expected different ones, found {ports}")


class Deployment:
    """An open folder. Use it as a context manager."""

    def __init__(self, folder: Path, *, now: Callable[[], float] = time.time) -> None:
        """
        Raises: DeploymentError for a folder that `create` did not finish, or settings that cannot
            be meant; AuthorityError, RegistryError, SignatureError for what lies in it.
        """
        self.folder = folder
        self.settings = _read_settings(folder / SETTINGS_FILE)
        self.signing_key: Ed25519PrivateKey = load_private_key(folder / _SIGNING_KEY)
        self.authority = Authority.open(folder / _AUTHORITY, now=now)
        self.store = Store(folder / _REGISTRY)
        self.enrolment = Enrolment(
            self.authority,
            self.store,
            coordinator=self.settings.name,
            signing_key=public_key_hex(self.signing_key),
            now=now,
        )
        self.jobs = Jobs(self.store, self.enrolment.audit, now=now)

    @classmethod
    def create(
        cls, folder: Path, settings: Settings, *, now: Callable[[], float] = time.time
    ) -> Deployment:
        """A new deployment; goes on where a crash cut it off.

        Raises: DeploymentError if there is one already; as the constructor.
        """
        if (folder / SETTINGS_FILE).exists():
            raise DeploymentError(
                f"{folder}: there is a deployment already, and devices trust it; choose another "
                "folder"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)
            if not (folder / _AUTHORITY / CERTIFICATE_FILE).exists():
                Authority.create(folder / _AUTHORITY, settings.name, now=now)
            if not (folder / _SIGNING_KEY).exists():
                save_private_key(new_key(), folder / _SIGNING_KEY)
            if not (folder / _OPERATOR_TOKEN).exists():
                write_whole(folder / _OPERATOR_TOKEN, secrets.token_hex(32).encode())
            write_whole(folder / SETTINGS_FILE, _written(settings).encode(), mode=PUBLIC)
        except OSError as error:
            raise DeploymentError(f"{folder}: the deployment cannot be made ({error})") from error
        return cls(folder, now=now)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Write what waits, and close the registry."""
        self.enrolment.devices.flush()
        self.store.close()

    @property
    def jobs_folder(self) -> Path:
        """A folder for each job."""
        return self.folder / _JOBS

    def operator_token(self) -> str:
        """What whoever reads metrics shows. Raises: SignatureError if others may read it."""
        return read_private(self.folder / _OPERATOR_TOKEN, _MAX_TOKEN_BYTES).decode("ascii")


def _read_settings(path: Path) -> Settings:
    try:
        with path.open("rb") as file:
            table = tomllib.loads(file.read(_MAX_SETTINGS_BYTES).decode("utf-8"))
    except FileNotFoundError:
        raise DeploymentError(
            f"{path}: expected a deployment, found none; make one with: "
            f"fedloom coordinator init {path.parent}"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DeploymentError(f"{path}: expected TOML ({error})") from error
    return _settings_of(path, table)


def _settings_of(path: Path, table: Mapping[str, object]) -> Settings:
    known = [item.name for item in dataclasses.fields(Settings)]
    if strange := sorted(set(table) - set(known)):
        raise DeploymentError(f"{path}: expected the keys {', '.join(known)}, found {strange[0]}")
    given = dict(table)
    addresses = given.get("addresses")
    if not isinstance(addresses, list) or not all(isinstance(each, str) for each in addresses):
        raise DeploymentError(f"{path}: addresses: expected a list of texts, found {addresses}")
    if not isinstance(given.get("name"), str):
        raise DeploymentError(f"{path}: name: expected a text, found {given.get('name')}")
    try:
        return Settings(**{**given, "addresses": tuple(addresses)})  # type: ignore[arg-type]
    except DeploymentError as error:
        raise DeploymentError(f"{path}: {error}") from None


def _written(settings: Settings) -> str:
    lines = ["# Read when the coordinator starts. Devices know it by its authority, not by this."]
    for item in dataclasses.fields(settings):
        lines.append(f"{item.name} = {toml_value(getattr(settings, item.name))}")
    return "\n".join(lines) + "\n"


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
