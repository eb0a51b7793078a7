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
    ├── sums/         where the device is in secure sums, a file a job; holds secrets
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
_BUNDLES: Final = "bundles"
_OUTBOX: Final = "outbox"
_MEMORY: Final = "memory"
_SUMS: Final = "sums"
_FLOWER: Final = "flower"
_PORTS: Final = "split.json"
_LAST: Final = "last.json"
_RUNNING: Final = "running"
_IN_WORK: Final = (_BUNDLES, _OUTBOX, _MEMORY, _SUMS, _FLOWER, _PORTS, _LAST, _RUNNING)
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
        return self.work / _BUNDLES

    @property
    def outbox(self) -> Path:
        """Of `Outbox`."""
        return self.work / _OUTBOX

    @property
    def sums(self) -> Path:
        """Of `FolderSums`."""
        return self.work / _SUMS

    @property
    def flower(self) -> Path:
        """FLWR_HOME."""
        return self.work / _FLOWER

    def memory(self, job: str) -> Path:
        """Of a job's `FolderMemory`; `job` is hex."""
        return self.work / _MEMORY / job

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
        port = self._read(self.work / _PORTS).get(job, 0)
        return port if isinstance(port, int) else 0

    def set_split_port(self, job: str, port: int) -> None:
        """Raises: OSError."""
        path = self.work / _PORTS
        known = self._read(path)
        if known.get(job, 0) != port:
            known.pop(job, None)
            latest = [*known.items(), (job, port)][-_MOST_PORTS:]
            self._write(path, dict(latest))

    def last(self) -> dict[str, Any]:
        """What `note` kept; {} before the device was asked anything."""
        return self._read(self.work / _LAST)

    def note(self, what: str, happened: Mapping[str, object]) -> None:
        """Keep what came of the last "survey" or "work". Raises: OSError."""
        self._write(self.work / _LAST, self.last() | {what: dict(happened)})

    @contextmanager
    def running(self) -> Iterator[None]:
        """Held by the one process that runs the device, or takes it apart. Raises: RunningError."""
        make_folder(self.work)
        descriptor = os.open(self.work / _RUNNING, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
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
            with open(self.work / _RUNNING, "rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return int(file.read(20) or b"0")
        except (OSError, ValueError):
            pass
        return None

    def require_free(self) -> None:
        """Before the device asks to enrol: nothing of others has the names of what it will keep.

        Raises: IdentityError.
        """
        for path in (self.folder / _COORDINATOR, self.folder / _SETTINGS, self.work):
            if path.exists():
                raise IdentityError(
                    f"{path}: expected nothing of that name before the device enrols; use another "
                    "folder, or move it away"
                )

    def leave(self) -> None:
        """Remove all that the device made, and nothing else. Raises: RunningError, IdentityError.

        What is cut off in the middle goes on with the next call.
        """
        try:
            if self.work.is_dir():
                with self.running():
                    for name in _IN_WORK:
                        _remove(self.work / name)
                if not any(self.work.iterdir()):
                    self.work.rmdir()
            for name in (_COORDINATOR, _SETTINGS):
                _remove(self.folder / name)
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


def _remove(path: Path) -> None:
    """A file, with what killed writers of it left, or a folder. Raises: OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
        return
    for file in (*partial_files(path), path):
        file.unlink(missing_ok=True)
