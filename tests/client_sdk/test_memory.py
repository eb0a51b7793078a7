# SPDX-License-Identifier: Apache-2.0
"""What a client keeps between rounds, and that nothing half-written is ever read."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from client_sdk.errors import MemoryFileError
from client_sdk.memory import FolderMemory


def tensors(value: float) -> dict[str, np.ndarray]:
    return {"a": np.full(3, value, np.float32), "b/c": np.full((2, 2), -value, np.float32)}


def test_the_latest_round_before_the_asked_one_is_found(tmp_path: Path) -> None:
    memory = FolderMemory(tmp_path / "m")
    assert memory.latest("residual", before=9) == {}
    for number in (2, 10):
        memory.save("residual", number, tensors(number))
    assert memory.latest("residual", before=2) == {}
    for before, number in ((3, 2), (10, 2), (11, 10)):
        found = memory.latest("residual", before=before)
        assert found.keys() == {"a", "b/c"}
        np.testing.assert_array_equal(found["b/c"], tensors(number)["b/c"])
    np.testing.assert_array_equal(memory.of_round("residual", 10)["a"], tensors(10)["a"])
    assert memory.of_round("residual", 3) == {}
    assert memory.latest("broadcast", before=99) == {}


def test_two_rounds_are_kept_and_a_round_played_again_replaces_itself(tmp_path: Path) -> None:
    memory = FolderMemory(tmp_path)
    for number in (1, 2, 3):
        memory.save("residual", number, tensors(number))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "residual-2.safetensors", "residual-3.safetensors",
    ]  # fmt: skip
    memory.save("residual", 3, tensors(7))
    np.testing.assert_array_equal(memory.of_round("residual", 3)["a"], tensors(7)["a"])
    np.testing.assert_array_equal(memory.latest("residual", before=3)["a"], tensors(2)["a"])


def test_a_crash_while_writing_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = FolderMemory(tmp_path)
    memory.save("residual", 1, tensors(1))

    def crash(source: Path, target: Path) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(MemoryFileError, match=r"residual-2\.safetensors.*power cut"):
        memory.save("residual", 2, tensors(2))
    monkeypatch.undo()
    np.testing.assert_array_equal(memory.latest("residual", before=9)["a"], tensors(1)["a"])


def test_files_are_for_this_user_alone_and_leavings_of_a_killed_writer_go(tmp_path: Path) -> None:
    memory = FolderMemory(tmp_path / "m")
    memory.save("personal", 1, tensors(1))
    (tmp_path / "m" / ".personal-2.safetensors.0123abcd.partial").write_bytes(b"half")
    memory.save("personal", 3, tensors(3))
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [
        "personal-1.safetensors", "personal-3.safetensors",
    ]  # fmt: skip
    modes = {path: path.stat().st_mode & 0o777 for path in (tmp_path / "m").iterdir()}
    assert set(modes.values()) == {0o600} and (tmp_path / "m").stat().st_mode & 0o777 == 0o700


def test_a_spoilt_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    memory = FolderMemory(tmp_path)
    memory.save("residual", 1, tensors(1))
    path = tmp_path / "residual-1.safetensors"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(MemoryFileError, match=r"residual-1\.safetensors.*remove the file"):
        memory.latest("residual", before=2)


@pytest.mark.parametrize("name", ["../../etc", "a/b", "", "Zoë", "x" * 300])
def test_clients_of_any_name_have_folders_of_their_own(tmp_path: Path, name: str) -> None:
    FolderMemory.of(tmp_path, name).save("residual", 1, tensors(1))
    FolderMemory.of(tmp_path, "other").save("residual", 1, tensors(2))
    (first,) = (
        path for path in tmp_path.iterdir() if path != FolderMemory.of(tmp_path, "other")._folder
    )
    assert first.parent == tmp_path
    np.testing.assert_array_equal(
        FolderMemory.of(tmp_path, name).latest("residual", before=2)["a"], tensors(1)["a"]
    )
