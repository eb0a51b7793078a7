# SPDX-License-Identifier: Apache-2.0
"""Jobs' bundles on a device: fetched once, from wherever a broken download was, and then kept.

    FOLDER/
    ├── lock
    ├── JOB/              whole: every byte is what the coordinator signed
    └── JOB.partial/      on its way

The manifest comes first and is believed only with the pinned key's signature; only then is anything
fetched that it lists, each file bounded by its size and checked by its hash as it comes. Whoever
opens a bundle has all of it checked once more.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Protocol

from client_sdk.durable import locked, make_folder
from client_sdk.errors import (
    CoordinatorStatusError,
    CoordinatorUnreachableError,
    FetchError,
)
from client_sdk.gateway import Download
from edge_runtime.bundle import Bundle, open_bundle
from edge_runtime.errors import BundleError
from protocol.errors import ManifestError, SignatureError
from protocol.files import MANIFEST_NAME, SIGNATURE_NAME, SIGNER_NAME, FileEntry
from protocol.limits import MAX_MANIFEST_BYTES
from protocol.manifest import Manifest
from protocol.owned_files import sync_folder, write_whole
from protocol.signing import SIGNATURE_BYTES, verify

DEFAULT_BYTES: Final = 4 << 30

_PARTIAL: Final = ".partial"
_LOCK: Final = "lock"
_CHUNK: Final = 256 << 10
_PASSING: Final = (408, 429, 500, 502, 503, 504)

_log = logging.getLogger(__name__)


class DownloadFile(Protocol):
    """As `Gateway.download`."""

    def __call__(
        self, job: str, name: str, *, first: int = 0, etag: str = ""
    ) -> AbstractContextManager[Download]:
        """A file of a job's bundle from a byte on."""
        ...


@dataclass(frozen=True, slots=True)
class Held:
    """A bundle that is here whole."""

    job: str
    size: int  # bytes


class BundleCache:
    """The bundles of one device, at most `max_bytes` together; the least recently used go first.

    Processes fetch in turns. A fetch goes on after `tries` broken connections in a row only if
    bytes came in between; before each it waits, first `pause_s` and then ever longer.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_bytes: int = DEFAULT_BYTES,
        tries: int = 5,
        pause_s: float = 1.0,
    ) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._tries = tries
        self._pause_s = pause_s

    def get(self, job: str, public_key: str, download: DownloadFile) -> Bundle:
        """A job's bundle, signed by `public_key`; fetched if it is not here.

        Raises: FetchError; CoordinatorUnreachableError, DeniedError as `download`.
        """
        if bundle := self._opened(job, public_key):
            return bundle
        try:
            make_folder(self._folder)
            with locked(self._folder / _LOCK):
                # Another process may have been first.
                if bundle := self._opened(job, public_key):
                    return bundle
                shutil.rmtree(self._folder / job, ignore_errors=True)
                return self._fetched(job, public_key, download)
        except OSError as error:
            raise FetchError(
                f"bundle {job[:12]}: {self._folder} cannot be written ({error.strerror or error}); "
                "make room, or set the folder's owner right"
            ) from error

    def opened(self, job: str, public_key: str) -> Bundle | None:
        """The bundle if it is here and whole; nothing is fetched."""
        return self._opened(job, public_key)

    def held(self) -> list[Held]:
        """The bundles that are here, the least recently used first."""
        if not self._folder.is_dir():
            return []
        found = [path for path in self._folder.iterdir() if path.is_dir() and not path.suffix]
        return [Held(path.name, _size(path)) for path in sorted(found, key=_used)]

    def _opened(self, job: str, public_key: str) -> Bundle | None:
        folder = self._folder / job
        if not folder.is_dir():
            return None
        try:
            bundle = open_bundle(folder, public_key=public_key)
            if bundle.manifest.job != job:
                raise BundleError(f"bundle {folder}: it is of job {bundle.manifest.job[:12]}")
            os.utime(folder)
        except (BundleError, OSError) as error:
            _log.warning("%s; it is fetched again", error)
            return None
        return bundle

    def _fetched(self, job: str, public_key: str, download: DownloadFile) -> Bundle:
        fetch = _Fetch(job, download, self._tries, self._pause_s)
        manifest, envelope = self._manifest(job, public_key, fetch)
        partial = self._folder / f"{job}{_PARTIAL}"
        make_folder(partial)
        _remove_strays(partial, set(manifest.files))
        needed = sum(entry.size for entry in manifest.files.values())
        needed += sum(map(len, envelope.values()))
        self._make_room(job, needed, kept=partial)
        for name, entry in manifest.files.items():
            fetch.file(partial / name, name, entry)
        for name, content in envelope.items():
            write_whole(partial / name, content)
        try:
            bundle = open_bundle(partial, public_key=public_key)
        except BundleError as error:
            raise FetchError(f"bundle {job[:12]} cannot be used here: {error}") from error
        partial.rename(self._folder / job)
        sync_folder(self._folder)
        return replace(bundle, folder=self._folder / job)

    def _manifest(
        self, job: str, public_key: str, fetch: _Fetch
    ) -> tuple[Manifest, dict[str, bytes]]:
        """The manifest, of this job and signed by this key, and the files around it."""
        raw = fetch.small(MANIFEST_NAME, MAX_MANIFEST_BYTES)
        signature = fetch.small(SIGNATURE_NAME, SIGNATURE_BYTES)
        try:
            verify(raw, signature, public_key)
            manifest = Manifest.from_json(raw)
        except SignatureError:
            raise FetchError(
                f"bundle {job[:12]}: its manifest is not signed by {public_key}, which this device "
                "trusts; nothing of it was fetched"
            ) from None
        except ManifestError as error:
            raise FetchError(
                f"bundle {job[:12]}: {error}; this release of fedloom cannot read it"
            ) from None
        if manifest.job != job:
            raise FetchError(
                f"bundle {job[:12]}: expected its manifest, found that of job {manifest.job[:12]}; "
                "nothing of it was fetched"
            )
        signer = public_key.encode("ascii") + b"\n"
        return manifest, {MANIFEST_NAME: raw, SIGNATURE_NAME: signature, SIGNER_NAME: signer}

    def _make_room(self, job: str, needed: int, *, kept: Path) -> None:
        if needed > self._max_bytes:
            raise FetchError(
                f"bundle {job[:12]}: it has {needed} bytes, and this device keeps at most "
                f"{self._max_bytes}; allow it more"
            )
        others = [path for path in self._folder.iterdir() if path.is_dir() and path != kept]
        sizes = {path: _size(path) for path in sorted(others, key=_used)}
        used = sum(sizes.values())
        for path, size in sizes.items():
            if used + needed <= self._max_bytes:
                break
            _log.info("bundle %s makes room for another job's", path.name[:12])
            shutil.rmtree(path)
            used -= size
        free, missing = shutil.disk_usage(self._folder).free, needed - _size(kept)
        if free < missing:
            raise FetchError(
                f"bundle {job[:12]}: expected {missing} bytes free in {self._folder}, found {free}"
            )


class _Fetch:
    """Fetches files of one bundle, again and again where connections break."""

    def __init__(self, job: str, download: DownloadFile, tries: int, pause_s: float) -> None:
        self._job = job
        self._download = download
        self._tries = tries
        self._pause_s = pause_s

    def small(self, name: str, most: int) -> bytes:
        """A file of at most so many bytes, from its start."""
        for left in self._attempts():
            try:
                with self._download(self._job, name) as part:
                    if part.size > most:
                        raise FetchError(
                            f"bundle {self._job[:12]}: {name}: expected at most {most} bytes, "
                            f"found {part.size}"
                        )
                    content = b"".join(_pieces(part, part.size))
                if len(content) == part.size:
                    return content
            except CoordinatorUnreachableError as error:
                _raise_unless_passing(error, left)
        raise self._broken(name)

    def file(self, path: Path, name: str, entry: FileEntry) -> None:
        """A file of the manifest, durably at `path`; goes on with what is there already."""
        path.parent.mkdir(parents=True, exist_ok=True)
        before = -1
        while True:
            for left in self._attempts():
                try:
                    if self._more(path, name, entry):
                        return
                except CoordinatorUnreachableError as error:
                    _raise_unless_passing(error, left)
                if (there := path.stat().st_size) > before:
                    before = there
                    break  # bytes came: all tries are there again
            else:
                raise self._broken(name)

    def _more(self, path: Path, name: str, entry: FileEntry) -> bool:
        """One connection's worth of a file; whether it is whole now."""
        with path.open("a+b") as file:
            file.seek(0)
            digest = hashlib.sha256()
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
            kept = have = file.tell()
            if have < entry.size:
                with self._download(self._job, name, first=have, etag=f'"{entry.sha256}"') as part:
                    if part.size != entry.size:
                        raise FetchError(
                            f"bundle {self._job[:12]}: {name}: expected {entry.size} bytes, the "
                            f"coordinator has {part.size}"
                        )
                    if part.first != have:
                        file.truncate(0)
                        digest, kept, have = hashlib.sha256(), 0, 0
                    for chunk in _pieces(part, entry.size - have):
                        file.write(chunk)
                        digest.update(chunk)
                        have += len(chunk)
            file.flush()
            os.fsync(file.fileno())
        if have < entry.size:
            return False
        if have == entry.size and digest.hexdigest() == entry.sha256:
            return True
        path.unlink()
        if kept:
            # What was kept may be what was spoilt, as by a power cut.
            return self._more(path, name, entry)
        raise FetchError(
            f"bundle {self._job[:12]}: {name}: expected SHA-256 {entry.sha256}, found "
            f"{digest.hexdigest()}; it was changed after it was signed"
        )

    def _attempts(self) -> Iterator[int]:
        """How many are left after each, with growing pauses in between."""
        pause = self._pause_s
        for number in range(self._tries):
            if number:
                time.sleep(pause)
                pause *= 2
            yield self._tries - number - 1

    def _broken(self, name: str) -> FetchError:
        return FetchError(
            f"bundle {self._job[:12]}: {name}: the connection broke {self._tries} times in a row; "
            "what came is kept, and the next attempt goes on from there"
        )


def _raise_unless_passing(error: CoordinatorUnreachableError, left: int) -> None:
    if isinstance(error, CoordinatorStatusError) and error.status not in _PASSING:
        raise FetchError(f"{error}") from error
    if not left:
        raise error


def _pieces(part: Download, count: int) -> Iterator[bytes]:
    """At most `count` bytes; fewer where the connection was cut."""
    while count and (chunk := part.read(min(_CHUNK, count))):
        count -= len(chunk)
        yield chunk


def _remove_strays(folder: Path, listed: set[str]) -> None:
    """What an earlier manifest of the job listed, or a crash left."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.is_symlink() or path.relative_to(folder).as_posix() not in listed:
            path.unlink()


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def _used(path: Path) -> float:
    return path.stat().st_mtime
