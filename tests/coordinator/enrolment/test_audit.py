# SPDX-License-Identifier: Apache-2.0
"""The log only grows, and whoever meddles with it is found at the entry."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from coordinator.enrolment.audit import Audit, Broken
from coordinator.errors import RegistryError


@pytest.fixture
def audit(desk: Any) -> Audit:
    audit = Audit(desk.store, now=desk.clock)
    for number in range(1, 6):
        desk.clock += 0.1
        audit.append("enrolled", f"cam-{number}", caller="10.0.0.1", rounds=number)
    return audit


def meddle(folder: Path, statement: str) -> None:
    """With the file in hand, and the triggers gone."""
    db = sqlite3.connect(folder / "registry.sqlite")
    db.executescript(f"DROP TRIGGER audit_stays; DROP TRIGGER audit_grows; {statement}")
    db.close()


def test_entries_come_back_in_order(audit: Audit) -> None:
    assert audit.verify() is None
    entries = list(audit.entries())
    assert [entry.number for entry in entries] == [1, 2, 3, 4, 5]
    assert entries[1].subject == "cam-2"
    assert entries[1].detail == {"caller": "10.0.0.1", "rounds": 2}
    assert [entry.number for entry in audit.entries(after=3)] == [4, 5]
    assert audit.head() == (5, entries[-1].hash)


def test_empty_log_is_whole(desk: Any) -> None:
    audit = Audit(desk.store, now=desk.clock)
    assert audit.verify() is None and list(audit.entries()) == []
    assert audit.head() == (0, "0" * 64)


@pytest.mark.parametrize(("statement", "number", "words"), [
    ("UPDATE audit SET subject = 'cam-9' WHERE number = 3", 3, "its hash is not that"),
    ("UPDATE audit SET detail = replace(detail, '10.', '11.') WHERE number = 2", 2, "its hash"),
    ("UPDATE audit SET time = time + 1e-3 WHERE number = 5", 5, "its hash"),
    ("UPDATE audit SET event = 'renewed' WHERE number = 1", 1, "its hash"),
    ("UPDATE audit SET hash = lower(hex(randomblob(32))) WHERE number = 4", 4, "its hash"),
    ("UPDATE audit SET detail = x'ff00' WHERE number = 4", 4, "its hash"),
    ("UPDATE audit SET detail = CAST(x'ff' AS TEXT) WHERE number = 4", 4, "its hash"),
    ("DELETE FROM audit WHERE number = 3", 3, "expected it here, found entry 4"),
    ("DELETE FROM audit WHERE number = 1", 1, "expected it here, found entry 2"),
    ("INSERT INTO audit SELECT 0, time, event, subject, detail, hash FROM audit LIMIT 1", 1,
     "expected it here, found entry 0"),
    ("UPDATE audit SET subject = (SELECT subject FROM audit WHERE number = 2), hash = (SELECT hash "
     "FROM audit WHERE number = 2) WHERE number = 3", 3, "its hash"),
])  # fmt: skip
def test_first_changed_entry_is_named(
    desk: Any, audit: Audit, statement: str, number: int, words: str
) -> None:
    meddle(desk.folder, statement)
    broken = audit.verify()
    assert isinstance(broken, Broken)
    assert broken.number == number and words in broken.reason
    assert str(broken).startswith(f"audit log: entry {number}: ")


def test_noted_head_finds_a_log_that_was_cut_off_or_made_anew(desk: Any, audit: Audit) -> None:
    head = audit.head()
    audit.append("revoked", "cam-1")
    assert audit.verify(head=head) is None
    meddle(desk.folder, "DELETE FROM audit WHERE number >= 4")
    assert audit.verify() is None
    broken = audit.verify(head=head)
    assert broken is not None and broken.number == 4
    assert "entry 5 was there once" in broken.reason
    for number in (4, 5):
        audit.append("enrolled", f"cam-{number}", caller="elsewhere")
    assert audit.verify() is None
    broken = audit.verify(head=head)
    assert broken is not None and broken.number == 5
    assert "another when its hash was noted" in broken.reason


@pytest.mark.parametrize("statement", ["UPDATE audit SET event = ''", "DELETE FROM audit"])
def test_log_cannot_be_changed_by_mistake(desk: Any, audit: Audit, statement: str) -> None:
    with pytest.raises(sqlite3.IntegrityError, match="append-only"), desk.store.transaction() as db:
        db.execute(statement)
    assert audit.verify() is None


def test_unreadable_entry_is_named(desk: Any, audit: Audit) -> None:
    meddle(desk.folder, "UPDATE audit SET detail = '{' WHERE number = 2")
    with pytest.raises(RegistryError, match="entry 2 cannot be read"):
        list(audit.entries())


def test_entry_is_undone_with_the_transaction_that_it_was_a_part_of(
    desk: Any, audit: Audit
) -> None:
    with pytest.raises(ZeroDivisionError), desk.store.transaction():
        audit.append("enrolled", "cam-6")
        _ = 1 / 0
    assert audit.head()[0] == 5 and audit.verify() is None


def test_strangers_cause_so_many_entries_a_minute_and_the_others_are_counted(desk: Any) -> None:
    audit = Audit(desk.store, now=desk.clock, per_minute=3)
    for _ in range(10):
        audit.append_limited("refused", "enrol")
    audit.append("enrolled", "cam")
    desk.clock += 60
    audit.append_limited("refused", "enrol")
    events = [(entry.event, entry.detail) for entry in audit.entries()]
    refused: tuple[str, dict[str, object]] = ("refused", {})
    assert events == [
        *[refused] * 3, ("enrolled", {}), ("left out", {"entries": 7}), refused
    ]  # fmt: skip
    assert audit.verify() is None


def test_long_log_is_verified_in_pieces(desk: Any) -> None:
    audit = Audit(desk.store, now=desk.clock)
    with desk.store.transaction():
        for _ in range(2_100):
            audit.append("renewed", "cam")
    assert audit.verify() is None and sum(1 for _ in audit.entries()) == 2_100
    meddle(desk.folder, "UPDATE audit SET event = 'x' WHERE number = 2050")
    broken = audit.verify()
    assert broken is not None and broken.number == 2_050
