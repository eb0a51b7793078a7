# SPDX-License-Identifier: Apache-2.0
"""Downloads of bundles: whole, from the middle, and nothing beside them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coordinator.gateway import bundles
from protocol.files import hash_files

HASH = "ab" * 32
GRAPH = bytes(range(256)) * 3000  # several pieces


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle of two files, with a manifest that holds nothing but their list."""
    made = tmp_path / "bundle"
    (made / "inner").mkdir(parents=True)
    (made / "graph.onnx").write_bytes(GRAPH)
    (made / "inner" / "empty").write_bytes(b"")
    files = hash_files(made)
    (made / "manifest.json").write_text(
        json.dumps({name: dataclasses.asdict(entry) for name, entry in files.items()})
    )
    (made / "unlisted").write_bytes(b"secret")
    (tmp_path / "outside").write_bytes(b"secret")

    def from_json(raw: bytes) -> SimpleNamespace:
        entries = json.loads(raw).items()
        return SimpleNamespace(files={name: bundles.FileEntry(**entry) for name, entry in entries})

    monkeypatch.setattr(bundles.Manifest, "from_json", from_json)
    return made


@pytest.fixture
def gateway(serve: Any, folder: Path) -> Any:
    return serve(find_bundle=lambda name: folder if name == HASH else None)


@pytest.fixture
def download(gateway: Any) -> Any:
    def get(name: str, bundle: str = HASH, **headers: str) -> Any:
        given = {key.replace("_", "-"): value for key, value in headers.items()}
        with gateway.client() as client:
            return client.get(
                f"/v1/bundles/{bundle}/{name}", headers=gateway.device.headers() | given
            )

    return get


def test_file_comes_whole_with_its_hash_as_etag(download: Any) -> None:
    answer = download("graph.onnx")
    assert (answer.status_code, answer.content) == (200, GRAPH)
    assert answer.headers["etag"] == f'"{hashlib.sha256(GRAPH).hexdigest()}"'
    assert answer.headers["accept-ranges"] == "bytes"
    assert download("inner/empty").content == b""
    manifest = download("manifest.json")
    assert manifest.headers["etag"] == f'"{hashlib.sha256(manifest.content).hexdigest()}"'


def test_broken_download_goes_on_where_it_was(download: Any) -> None:
    etag = f'"{hashlib.sha256(GRAPH).hexdigest()}"'
    for first in (0, 1, 255, 300_000, len(GRAPH) - 1):
        answer = download("graph.onnx", range=f"bytes={first}-", if_range=etag)
        assert (answer.status_code, answer.content) == (206, GRAPH[first:])
        assert answer.headers["content-range"] == f"bytes {first}-{len(GRAPH) - 1}/{len(GRAPH)}"


def test_ranges(download: Any) -> None:
    size = len(GRAPH)
    for asked, part in {
        "bytes=0-0": GRAPH[:1],
        "bytes=5-9": GRAPH[5:10],
        "bytes=-7": GRAPH[-7:],
        f"bytes={size - 2}-{size + 100}": GRAPH[-2:],
        f"bytes=-{size + 100}": GRAPH,
    }.items():
        answer = download("graph.onnx", range=asked)
        assert (answer.status_code, answer.content) == (206, part), asked
    for asked in (f"bytes={size}-", "bytes=-0", f"bytes={size + 5}-{size + 9}"):
        answer = download("graph.onnx", range=asked)
        assert (answer.status_code, answer.content) == (416, b""), asked
        assert answer.headers["content-range"] == f"bytes */{size}"
    # What is no single range is answered by the whole file, as RFC 9110 allows.
    for asked in ("bytes=9-5", "bytes=-", "lines=1-2", "bytes=0-1,5-6", "bytes=a-b"):
        assert download("graph.onnx", range=asked).status_code == 200, asked
    assert download("inner/empty", range="bytes=0-").status_code == 416


def test_file_that_changed_is_sent_whole(download: Any) -> None:
    answer = download("graph.onnx", range="bytes=5-", if_range=f'"{"0" * 64}"')
    assert (answer.status_code, answer.content) == (200, GRAPH)


ELSEWHERE = (
    *("unlisted", "nothing", "inner", "inner/", "inner//empty", "inner/../graph.onnx"),
    *("../outside", "%2e%2e/outside", "..%2foutside", "../../../../etc/passwd", "/etc/passwd"),
    *("manifest.json.new", ".hidden", "graph.onnx%00", "graph.onnx/"),
)


def test_nothing_but_listed_files_is_there(gateway: Any, download: Any) -> None:
    for name in ELSEWHERE:
        # On a socket: a client of HTTP would resolve the dots by itself.
        with gateway.connect() as connection:
            headers = "".join(f"{k}: {v}\r\n" for k, v in gateway.device.headers().items())
            path = f"/v1/bundles/{HASH}/{name}"
            connection.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\n{headers}\r\n".encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 404 "), name
    assert download("graph.onnx", bundle="cd" * 32).status_code == 404
    assert download("graph.onnx", bundle="AB" * 32).status_code == 404


def test_link_in_the_place_of_a_file_is_refused(download: Any, folder: Path) -> None:
    (folder / "graph.onnx").unlink()
    (folder / "graph.onnx").symlink_to(folder.parent / "outside")
    assert download("graph.onnx").status_code == 404
    os.rename(folder / "inner", folder.parent / "elsewhere")
    (folder / "inner").symlink_to(folder.parent / "elsewhere")
    assert download("inner/empty").status_code == 404


def test_file_of_another_size_is_not_given_out(download: Any, folder: Path) -> None:
    (folder / "graph.onnx").write_bytes(b"short")
    answer = download("graph.onnx")
    assert answer.status_code == 500 and "not the manifest's" in answer.text


def test_stranger_gets_no_file(download: Any) -> None:
    assert download("graph.onnx", flwr_signature="AAAA").status_code == 401
