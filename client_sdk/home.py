# SPDX-License-Identifier: Apache-2.0
"""The folder of a device: what lies where, and how all of it goes.

FOLDER/
├── ...               who the device is: see `client_sdk.identity`
├── coordinator.json  where the coordinator is
├── settings.json     what its owner decided: data, conditions
└── work/
    ├── running       locked by the process that runs the device; its process number
    ├── bundles/      jobs, as they were fetched; the least recently used go first
    ├── outbox/       updates that the coordinator has not acknowledged
    ├── memory/       what the device keeps between rounds, a folder a job
    ├── flower/       FLWR_HOME, and the command that a SuperNode finds
    ├── split.json    by job, the port of the coordinator's split server
    └── last.json     what the device was asked last, and what came of it
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from client_sdk.durable import make_folder
from client_sdk.errors import ConditionsError, IdentityError, RunningError, SettingsError
from client_sdk.gateway import Address
from client_sdk.identity import leave_folder
from client_sdk.settings import Settings, pack_settings, unpack_settings
from protocol.errors import ManifestError
from protocol.files import read_small
from protocol.owned_files import partial_files, write_whole

FOLDER_VARIABLE: Final = "FEDLOOM_DEVICE"
PATH_VARIABLE: Final = "FEDLOOM_DEVICE_PATH"
"""Of the environment of a device's client processes: the folder, and the PATH of its owner."""

_COORDINATOR: Final = "coordinator.json"
_SETTINGS: Final = "settings.json"
_MAX_BYTES: Final = 64 * 1024
_MOST_PORTS: Final = 64  # jobs whose port is remembered


class Home:
    """A device's folder; nothing is made before something is kept there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.work = folder / "work"

    @property
    def bundles(self) -> Path:
        """Of `BundleCache`."""
        return self.work / "bundles"

    @property
    def outbox(self) -> Path:
        """Of `Outbox`."""
        return self.work / "outbox"

    @property
    def flower(self) -> Path:
        """FLWR_HOME."""
        return self.work / "flower"

    def memory(self, job: str) -> Path:
        """Of a job's `FolderMemory`; `job` is hex."""
        return self.work / "memory" / job

    def coordinator(self) -> Address:
        """Where the coordinator is. Raises: IdentityError where no enrolment left that."""
        found = self._read(self.folder / _COORDINATOR)
        try:
            return Address(str(found["host"]), int(found["port"]))
        except (KeyError, TypeError, ValueError):
            raise IdentityError(
                f"{self.folder / _COORDINATOR}: expected where the coordinator is, found nothing "
                "of it; enrol this device (again): fedloom device enroll"
            ) from None

    def set_coordinator(self, address: Address) -> None:
        """Raises: IdentityError where it cannot be kept."""
        try:
            self._write(self.folder / _COORDINATOR, address._asdict())
        except OSError as error:
            raise IdentityError(f"{self.folder}: cannot be written ({error})") from error

    def settings(self) -> Settings | None:
        """None before there are any. Raises: SettingsError."""
        path = self.folder / _SETTINGS
        if not path.exists():
            return None
        try:
            return unpack_settings(read_small(path, _MAX_BYTES))
        except (ManifestError, ConditionsError, SettingsError) as error:
            raise SettingsError(f"{path}: {error}") from error

    def set_settings(self, settings: Settings) -> None:
        """Raises: SettingsError where they cannot be kept."""
        try:
            write_whole(self.folder / _SETTINGS, pack_settings(settings))
        except OSError as error:
            raise SettingsError(f"{self.folder}: cannot be written ({error})") from error

    def split_port(self, job: str) -> int:
        """The port that the job's last survey told; 0 for none."""
        port = self._read(self.work / "split.json").get(job, 0)
        return port if isinstance(port, int) else 0

    def set_split_port(self, job: str, port: int) -> None:
        """Raises: OSError."""
        path = self.work / "split.json"
        known = self._read(path)
        if known.get(job, 0) != port:
            known.pop(job, None)
            latest = [*known.items(), (job, port)][-_MOST_PORTS:]
            self._write(path, dict(latest))

    def last(self) -> dict[str, Any]:
        """What `note` kept; {} before the device was asked anything."""
        return self._read(self.work / "last.json")

    def note(self, what: str, happened: Mapping[str, object]) -> None:
        """Keep what came of the last "survey" or "work". Raises: OSError."""
        self._write(self.work / "last.json", self.last() | {what: dict(happened)})

    @contextmanager
    def running(self) -> Iterator[None]:
        """Held by the one process that runs the device, or takes it apart. Raises: RunningError."""
        make_folder(self.work)
        descriptor = os.open(self.work / "running", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunningError(
                    f"{self.folder}: process {self.runner() or '?'} runs this device; stop it first"
                ) from None
            os.ftruncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
            yield
        finally:
            os.close(descriptor)

    def runner(self) -> int | None:
        """The process that runs the device; None where none does."""
        try:
            with open(self.work / "running", "rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return int(file.read(20) or b"0")
        except (OSError, ValueError):
            pass
        return None

    def leave(self) -> None:
        """Remove all that the device made, its key first. Raises: RunningError, IdentityError."""
        try:
            if self.work.is_dir():
                with self.running():
                    # By another name first: what is cut off in the middle is not half a device.
                    gone = self.folder / ".work.gone"
                    shutil.rmtree(gone, ignore_errors=True)
                    self.work.rename(gone)
            shutil.rmtree(self.folder / ".work.gone", ignore_errors=True)
            for name in (_COORDINATOR, _SETTINGS):
                path = self.folder / name
                for file in (*partial_files(path), path):
                    file.unlink(missing_ok=True)
        except OSError as error:
            raise IdentityError(f"{self.folder}: cannot be removed ({error})") from error
        leave_folder(self.folder)

    def _read(self, path: Path) -> dict[str, Any]:
        """A small file of ours; {} where it is missing or cannot be read."""
        with contextlib.suppress(ManifestError, ValueError):
            found = json.loads(read_small(path, _MAX_BYTES))
            if isinstance(found, dict):
                return found
        return {}

    def _write(self, path: Path, content: Mapping[str, object]) -> None:
        make_folder(path.parent)
        write_whole(path, json.dumps(content).encode())
