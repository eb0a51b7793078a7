# SPDX-License-Identifier: Apache-2.0
"""The files of bundles, from any byte on, so that a broken download costs what was not yet there.

*Source* RFC 9110, section 14 (one range a request; several are answered by the whole file).
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import anyio.to_thread
from starlette.responses import Response, StreamingResponse

from coordinator.errors import RefusedError
from coordinator.gateway.settings import FindBundle
from protocol.errors import ManifestError
from protocol.files import ENVELOPE, MANIFEST_NAME, FileEntry, hash_file, open_regular, read_small
from protocol.limits import MAX_MANIFEST_BYTES
from protocol.manifest import Manifest

_RANGE: Final = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
_CHUNK: Final = 256 << 10
_MOST_KNOWN: Final = 64  # bundles whose lists of files are remembered


@dataclass(frozen=True, slots=True)
class _Listing:
    stamp: tuple[int, int]  # of the manifest: nanoseconds of its last change, bytes
    files: Mapping[str, FileEntry]


class BundleFiles:
    """Answers for the files that a bundle's manifest lists, and for the manifest itself."""

    def __init__(self, find: FindBundle) -> None:
        self._find = find
        self._known: OrderedDict[str, _Listing] = OrderedDict()

    async def answer(self, bundle: str, name: str, headers: Mapping[str, str]) -> Response:
        """A file or a part of it; `headers` in lower case. Raises: RefusedError."""
        folder, entry = await anyio.to_thread.run_sync(self._look_up, bundle, name)
        etag = f'"{entry.sha256}"'
        common = {"etag": etag, "accept-ranges": "bytes", "cache-control": "private, immutable"}
        first, last = 0, entry.size - 1
        asked = headers.get("range", "")
        if headers.get("if-range", etag) != etag:
            asked = ""  # it began with another file: it is sent this one whole
        part = _part(asked, entry.size)
        if part is not None:
            first, last = part
            if first > last:
                unsatisfied = common | {"content-range": f"bytes */{entry.size}"}
                return Response(status_code=416, headers=unsatisfied)
            common["content-range"] = f"bytes {first}-{last}/{entry.size}"
        common["content-length"] = str(last - first + 1)
        return StreamingResponse(
            _pieces(folder / name, first, last - first + 1),
            status_code=200 if part is None else 206,
            headers=common,
            media_type="application/octet-stream",
        )

    def _look_up(self, bundle: str, name: str) -> tuple[Path, FileEntry]:
        folder = self._find(bundle)
        if folder is None:
            raise RefusedError(f"no bundle {bundle[:12]} is here", status=404)
        try:
            if name in ENVELOPE:
                return folder, hash_file(folder / name)
            entry = self._files(bundle, folder).get(name)
            if entry is None:
                raise RefusedError(f"bundle {bundle[:12]} lists no such file", status=404)
            path = folder / name
            if path.resolve() != folder.resolve() / name:
                raise RefusedError(f"{name}: expected a file, found a link", status=404)
            os.close(open_regular(path))
            if path.stat().st_size != entry.size:
                raise RefusedError(f"{name}: its size is not the manifest's", status=500)
        except ManifestError as error:
            raise RefusedError(f"bundle {bundle[:12]}: {error}", status=404) from None
        return folder, entry

    def _files(self, bundle: str, folder: Path) -> Mapping[str, FileEntry]:
        """Of the manifest as it is now: parsed again only when it changed."""
        path = folder / MANIFEST_NAME
        try:
            status = path.stat()
        except OSError as error:
            raise ManifestError(f"{MANIFEST_NAME}: cannot be read: {error.strerror}") from None
        stamp = (status.st_mtime_ns, status.st_size)
        known = self._known.get(bundle)
        if known is None or known.stamp != stamp:
            manifest = Manifest.from_json(read_small(path, MAX_MANIFEST_BYTES))
            known = self._known[bundle] = _Listing(stamp, manifest.files)
            if len(self._known) > _MOST_KNOWN:
                self._known.popitem(last=False)
        return known.files


def _part(asked: str, size: int) -> tuple[int, int] | None:
    """First and last byte of a Range header; None where the whole file is meant.

    A first byte after the last one says that the range cannot be satisfied.
    """
    match = _RANGE.fullmatch(asked.strip())
    if match is None:
        return None
    first, last = match.groups()
    if not first:
        if not last:
            return None
        count = min(int(last), size)
        return (size - count, size - 1) if count else (1, 0)
    if last and int(last) < int(first):
        return None
    if int(first) >= size:
        return 1, 0
    return int(first), min(int(last), size - 1) if last else size - 1


async def _pieces(path: Path, first: int, count: int) -> AsyncIterator[bytes]:
    """Read on other threads: a slow disk must not hold up everybody else's requests."""
    descriptor = await anyio.to_thread.run_sync(open_regular, path)
    try:
        end = first + count
        while first < end:
            chunk = await anyio.to_thread.run_sync(
                os.pread, descriptor, min(_CHUNK, end - first), first
            )
            if not chunk:
                raise ManifestError(f"{path.name}: became shorter while it was sent")
            first += len(chunk)
            yield chunk
    finally:
        os.close(descriptor)
