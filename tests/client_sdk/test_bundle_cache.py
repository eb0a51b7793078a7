# SPDX-License-Identifier: Apache-2.0
"""Bundles fetched from the real gateway, over connections that break."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from client_sdk.bundle_cache import BundleCache
from client_sdk.errors import CoordinatorUnreachableError, DeniedError, FetchError
from client_sdk.gateway import Download
from coordinator.bundles import sign_bundle
from protocol.files import BACKBONE_FILE, INITIAL_FILE, hash_files
from protocol.manifest import Manifest
from protocol.signing import new_key, public_key_hex


@pytest.fixture
def device(served: Any, tmp_path: Path) -> Any:
    return served.enrolled(tmp_path / "device")


@pytest.fixture
def job(served: Any, make_bundle: Any) -> str:
    return str(served.offer(make_bundle("lora")))


def cache(tmp_path: Path, **options: Any) -> BundleCache:
    return BundleCache(tmp_path / "cache", **({"pause_s": 0.01} | options))


def signer(device: Any) -> str:
    return str(device.membership.signing_key)


class Counted:
    """A gateway's download, and what was asked of it."""

    def __init__(self, gateway: Any) -> None:
        self.asked: list[tuple[str, int]] = []
        self._gateway = gateway

    @contextlib.contextmanager
    def __call__(
        self, job: str, name: str, *, first: int = 0, etag: str = ""
    ) -> Iterator[Download]:
        self.asked.append((name, first))
        with self._gateway.download(job, name, first=first, etag=etag) as part:
            yield part


class _Cut:
    """A download that ends early."""

    def __init__(self, part: Any, most: int) -> None:
        self.first, self.size, self._part, self._left = part.first, part.size, part, most

    def read(self, most: int) -> bytes:
        data: bytes = self._part.read(min(most, self._left))
        self._left -= len(data)
        return data


def test_bundle_is_fetched_once_and_opened_as_signed(
    served: Any, device: Any, job: str, tmp_path: Path
) -> None:
    download = Counted(served.gateway(device))
    bundle = cache(tmp_path).get(job, signer(device), download)
    assert bundle.manifest.job == job and bundle.public_key == signer(device)
    assert bundle.folder == tmp_path / "cache" / job and bundle.initial()
    fetched = len(download.asked)
    assert download.asked[:2] == [("manifest.json", 0), ("manifest.sig", 0)]
    assert cache(tmp_path).get(job, signer(device), download).folder == bundle.folder
    assert len(download.asked) == fetched
    assert [held.job for held in cache(tmp_path).held()] == [job]
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_broken_connections_cost_what_was_not_yet_there(
    served: Any, device: Any, job: str, tmp_path: Path, cutting: Any
) -> None:
    folder = served.bundle_folder(job)
    (folder / "large").write_bytes(os.urandom(600_000))
    manifest = Manifest.from_json((folder / "manifest.json").read_bytes())
    manifest = replace(manifest, files=hash_files(folder))
    sign_bundle(manifest, served.deployment.signing_key, folder)
    whole = sum(path.stat().st_size for path in folder.rglob("*"))
    # The manifest and its signature come whole, then nearly every connection breaks.
    proxy = cutting([1 << 40, 1 << 40, *[60_000] * 9])
    download = served.gateway(device, address=proxy.address).download
    bundle = cache(tmp_path).get(job, signer(device), download)
    assert (bundle.folder / "large").read_bytes() == (folder / "large").read_bytes()
    assert proxy.cuts == [] and proxy.connections > 11
    # What TLS and headers add to every connection, and what was cut inside of a record.
    assert proxy.passed < whole + proxy.connections * 20_000


def test_fetch_that_is_given_up_goes_on_the_next_time(
    served: Any, device: Any, job: str, tmp_path: Path
) -> None:
    gateway = served.gateway(device)
    size = (served.bundle_folder(job) / BACKBONE_FILE).stat().st_size

    @contextlib.contextmanager
    def gone(job: str, name: str, **options: Any) -> Iterator[Any]:
        if name == BACKBONE_FILE and options["first"]:
            raise CoordinatorUnreachableError("gone")
        with gateway.download(job, name, **options) as part:
            yield _Cut(part, size // 2) if name == BACKBONE_FILE else part

    with pytest.raises(CoordinatorUnreachableError, match="gone"):
        cache(tmp_path, tries=2).get(job, signer(device), gone)
    assert not (tmp_path / "cache" / job).exists()
    kept = tmp_path / "cache" / f"{job}.partial" / BACKBONE_FILE
    assert kept.stat().st_size == size // 2
    download = Counted(gateway)
    cache(tmp_path).get(job, signer(device), download)
    assert (BACKBONE_FILE, size // 2) in download.asked


def test_what_was_spoilt_on_disk_is_fetched_again(
    served: Any, device: Any, job: str, tmp_path: Path
) -> None:
    partial = tmp_path / "cache" / f"{job}.partial"
    partial.mkdir(parents=True)
    (partial / INITIAL_FILE).write_bytes(b"\0" * 100)  # as a power cut leaves it
    (partial / "unlisted").write_bytes(b"of an older manifest")
    (partial / "folder").mkdir()
    download = served.gateway(device).download
    bundle = cache(tmp_path).get(job, signer(device), download)
    (bundle.folder / INITIAL_FILE).write_bytes(b"changed")
    again = cache(tmp_path).get(job, signer(device), download)
    assert (
        again.initial().keys() == bundle.manifest.trainable.entries and False
    ) or again.initial()


def test_nothing_is_fetched_that_another_signed(
    served: Any, device: Any, job: str, tmp_path: Path
) -> None:
    download = Counted(served.gateway(device))
    with pytest.raises(FetchError, match=r"is not signed by .* nothing of it was fetched"):
        cache(tmp_path).get(job, public_key_hex(new_key()), download)
    assert [name for name, _ in download.asked] == ["manifest.json", "manifest.sig"]


def test_another_jobs_manifest_is_refused(
    served: Any, device: Any, job: str, tmp_path: Path
) -> None:
    served.deployment.jobs.add("ab" * 32, "ab" * 32)
    shutil.copytree(served.bundle_folder(job), served.bundle_folder("ab" * 32))
    with pytest.raises(FetchError, match="expected its manifest, found that of job"):
        cache(tmp_path).get("ab" * 32, signer(device), served.gateway(device).download)


def test_file_that_was_changed_on_the_server_is_refused(
    served: Any, device: Any, job: str, tmp_path: Path
) -> None:
    path = served.bundle_folder(job) / INITIAL_FILE
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(FetchError, match=r"expected SHA-256 .* changed after it was signed"):
        cache(tmp_path).get(job, signer(device), served.gateway(device).download)
    assert not (tmp_path / "cache" / job).exists()


def test_missing_bundle_is_said_at_once(served: Any, device: Any, tmp_path: Path) -> None:
    download = Counted(served.gateway(device))
    with pytest.raises(FetchError, match="404: no bundle abab"):
        cache(tmp_path).get("ab" * 32, signer(device), download)
    assert len(download.asked) == 1


def test_revoked_device_fetches_nothing(served: Any, device: Any, job: str, tmp_path: Path) -> None:
    served.deployment.enrolment.revoke(device.membership.device)
    with pytest.raises(DeniedError, match="revoked"):
        cache(tmp_path).get(job, signer(device), served.gateway(device).download)


def test_least_recently_used_bundles_make_room(
    served: Any, device: Any, job: str, tmp_path: Path, make_bundle: Any
) -> None:
    download = served.gateway(device).download
    other = served.offer(make_bundle("head"))
    third = served.offer(make_bundle("ssf"))
    for each in (job, other, job):
        cache(tmp_path).get(each, signer(device), download)
    sizes = {held.job: held.size for held in cache(tmp_path).held()}
    assert list(sizes) == [other, job]
    folder = served.bundle_folder(third)
    room = sizes[job] + sum(path.stat().st_size for path in folder.rglob("*"))
    cache(tmp_path, max_bytes=room).get(third, signer(device), download)
    assert [held.job for held in cache(tmp_path).held()] == [job, third]
    with pytest.raises(FetchError, match="this device keeps at most 1000; allow it more"):
        cache(tmp_path, max_bytes=1000).get(other, signer(device), download)


def test_full_disk_is_said_before_a_byte_is_fetched(
    served: Any, device: Any, job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    download = Counted(served.gateway(device))
    with pytest.raises(FetchError, match=r"expected \d+ bytes free .* found 10"):
        cache(tmp_path).get(job, signer(device), download)
    assert len(download.asked) == 2


def test_two_that_want_the_same_bundle_fetch_it_once(
    served: Any, device: Any, job: str, tmp_path: Path
) -> None:
    download = Counted(served.gateway(device))
    made: list[Any] = []

    def get() -> None:
        made.append(cache(tmp_path).get(job, signer(device), download))

    threads = [threading.Thread(target=get) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(made) == 3
    assert len({name for name, _ in download.asked}) == len(download.asked)


def test_nothing_but_json_and_numbers_lies_beside_the_bundle(
    served: Any, device: Any, job: str, tmp_path: Path
) -> None:
    bundle = cache(tmp_path).get(job, signer(device), served.gateway(device).download)
    listed = json.loads((bundle.folder / "manifest.json").read_bytes())["files"]
    found = {
        p.relative_to(bundle.folder).as_posix() for p in bundle.folder.rglob("*") if p.is_file()
    }
    assert found == {*listed, "manifest.json", "manifest.sig", "signer.pub"}
