# SPDX-License-Identifier: Apache-2.0
"""One file: all of a transaction or nothing, for its owner alone."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from coordinator.enrolment.store import _VERSIONS, Store
from coordinator.errors import RegistryError

ROW = ("h", "cam", 1, 0, 1.0, 2.0)
INSERT = "INSERT INTO tokens VALUES (?, ?, ?, ?, ?, ?)"


def test_files_are_their_owners_alone(tmp_path: Path) -> None:
    with Store(tmp_path / "registry.sqlite") as store:
        with store.transaction() as db:
            db.execute(INSERT, ROW)
        modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
        assert modes == dict.fromkeys(
            ("registry.sqlite", "registry.sqlite-wal", "registry.sqlite-shm"), 0o600
        )
        assert store.rows("PRAGMA journal_mode") == [("wal",)]
        assert store.rows("PRAGMA synchronous") == [(2,)]  # FULL


def test_inner_transaction_is_a_part_of_the_outer_one(tmp_path: Path) -> None:
    with Store(tmp_path / "r") as store:
        with pytest.raises(ZeroDivisionError), store.transaction():
            with store.transaction() as db:
                db.execute(INSERT, ROW)
            assert store.rows("SELECT hash FROM tokens") == [("h",)]
            _ = 1 / 0
        assert store.rows("SELECT hash FROM tokens") == []
        with store.transaction() as db:
            db.execute(INSERT, ROW)
    with Store(tmp_path / "r") as store:
        assert store.rows("SELECT hash FROM tokens") == [("h",)]


def test_full_disk_changes_nothing_and_is_said_so(tmp_path: Path) -> None:
    with Store(tmp_path / "r") as store:
        (pages,) = store.rows("PRAGMA page_count")[0]
        store.rows(f"PRAGMA max_page_count = {pages}")
        words = r"cannot be written .*full.*nothing was changed"
        with pytest.raises(RegistryError, match=words), store.transaction() as db:
            for number in range(1_000):
                db.execute(INSERT, (str(number) * 50, *ROW[1:]))
        assert store.rows("SELECT count(*) FROM tokens") == [(0,)]
        store.rows(f"PRAGMA max_page_count = {pages + 1_000}")
        with store.transaction() as db:
            db.execute(INSERT, ROW)


@pytest.mark.parametrize(("script", "words"), [
    (None, "expected a registry, found another file"),
    ("CREATE TABLE other (a)", "version 1 to 2, found another file"),
    ("PRAGMA application_id = 0x464C4445; PRAGMA user_version = 9; CREATE TABLE tokens (a)",
     "expected a registry of version 1 to 2, found version 9"),
])  # fmt: skip
def test_other_file_is_refused(tmp_path: Path, script: str | None, words: str) -> None:
    path = tmp_path / "r"
    if script is None:
        path.write_bytes(b"no database at all" * 100)
    else:
        db = sqlite3.connect(path)
        db.executescript(script)
        db.close()
    with pytest.raises(RegistryError, match=words):
        Store(path)


def test_an_older_file_is_brought_up_to_date(tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / "r")
    header = "PRAGMA application_id = 0x464C4445; PRAGMA user_version = 1;"
    db.executescript(_VERSIONS[0] + header)
    db.execute(INSERT, ROW)
    db.commit()
    db.close()
    for _ in range(2):
        with Store(tmp_path / "r") as store:
            assert store.rows("SELECT hash FROM tokens") == [("h",)]
            assert store.rows("SELECT name FROM jobs") == []
            assert store.rows("SELECT node FROM devices") == []


def test_file_that_cannot_be_made_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="cannot be opened"):
        Store(tmp_path / "none" / "r")
