# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import os

import pytest

from protocol import FileEntry, ManifestError, hash_files
from protocol.files import ENVELOPE, plain_path, read_small


def test_hash_files_lists_every_file_but_the_envelope(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("a.onnx", "deep/er/b_1-2.bin", *ENVELOPE):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "empty").write_bytes(b"")
    expected = {
        name: FileEntry(hashlib.sha256(data).hexdigest(), len(data))
        for name, data in (
            ("a.onnx", b"a.onnx"),
            ("deep/er/b_1-2.bin", b"deep/er/b_1-2.bin"),
            ("empty", b""),
        )
    }
    assert hash_files(tmp_path) == expected
    assert list(hash_files(str(tmp_path))) == sorted(expected)


@pytest.mark.parametrize("kind", ["link", "link to a folder", "dangling", "pipe"])
def test_hash_files_refuses_when_something_is_not_a_plain_file(tmp_path, kind):
    (tmp_path / "a").write_bytes(b"a")
    match kind:
        case "link":
            (tmp_path / "b").symlink_to("a")
        case "link to a folder":
            (tmp_path / "b").symlink_to(tmp_path)
        case "dangling":
            (tmp_path / "b").symlink_to("missing")
        case "pipe":
            os.mkfifo(tmp_path / "b")
    with pytest.raises(ManifestError, match="b: expected a file, found a"):
        hash_files(tmp_path)


def test_reading_refuses_links_pipes_and_more_than_the_limit(tmp_path):
    (tmp_path / "a").write_bytes(b"1234")
    (tmp_path / "b").symlink_to("a")
    os.mkfifo(tmp_path / "c")
    assert read_small(tmp_path / "a", 4) == b"1234"
    with pytest.raises(ManifestError, match="at most 3 bytes"):
        read_small(tmp_path / "a", 3)
    for name in ("b", "c", "missing", "."):
        with pytest.raises(ManifestError):
            read_small(tmp_path / name, 4)


@pytest.mark.parametrize("path", ["a", "train.onnx", "a/b/c.bin", "_x", "A-1.v2.bin"])
def test_plain_paths_pass(path):
    assert plain_path("file", path) == path


@pytest.mark.parametrize(
    "path",
    [
        "",
        ".",
        "..",
        "../a",
        "a/../../b",
        "a/..",
        "/etc/passwd",
        "//host/share",
        "a//b",
        "a/",
        "./a",
        "a\\b",
        "..\\a",
        "C:a",
        "C:\\a",
        "a:stream",
        ".hidden",
        "-flag",
        "a.",
        "a b",
        "a\x00b",
        "a\nb",
        "é",
        "a" * 256,
        None,
        3,
    ],
)
def test_plain_path_refuses_when_a_path_could_leave_the_folder(path):
    with pytest.raises(ManifestError, match="file"):
        plain_path("file", path)
