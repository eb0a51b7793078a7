# SPDX-License-Identifier: Apache-2.0
"""The journal: what is committed stays, what is not leaves no trace."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregation.packing import pack
from aggregation.privacy import FixedRound, PoissonRound
from coordinator.errors import JournalConflictError, JournalFormatError
from coordinator.journal import Charge, Journal, Kept, OpenedSum, Start, UpdateEntry
from protocol.rejection import Rejection, RejectionCode
from protocol.update import UpdateHeader

JOB = "ab" * 32
REJECTION = Rejection(client="c1", round=1, code=RejectionCode.NOT_FINITE, reason="NaN")


def commit(journal: Journal, number: int, **changes: Any) -> None:
    content: dict[str, Any] = {
        "tensors": {"w": np.full((2, 2), number, np.float32), "s": np.array(1, np.float32)},
        "moments": {"first/w": np.full((2, 2), -number, np.float64)},
        "report": {"round": number},
        "updates": [UpdateEntry(nonce=f"n{number}", client="c0", samples=3, bytes=70)],
        "rejections": [REJECTION],
    }
    journal.commit_round(JOB, number, **{**content, **changes})


def begin(journal: Journal, number: int, nonces: dict[str, str] | None = None) -> Start:
    return journal.begin_round(JOB, number, nonces or {}, known=9)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite"


def test_committed_round_is_there_when_opened_again(path: Path, initial: Any) -> None:
    with Journal(path) as journal:
        assert journal.open_run(JOB, "", initial)[0] == 0
        begin(journal, 1)
        commit(journal, 1)
    with Journal(path) as journal:
        done, tensors = journal.open_run(JOB, "", initial)
        assert done == 1
        assert tensors["w"].tolist() == [[1, 1], [1, 1]] and tensors["s"].shape == ()
        assert journal.reports(JOB) == [{"round": 1}]
        assert journal.rejections(JOB) == [REJECTION]
        assert journal.counted("n1") and not journal.counted("n2")


def test_round_is_begun_again_when_it_was_not_committed(path: Path, initial: Any) -> None:
    with Journal(path) as journal:
        journal.open_run(JOB, "", initial)
        assert journal.resume_round(JOB, 1) is None
        start = begin(journal, 1, {"b": "02", "a": "01"})
        with pytest.raises(JournalConflictError, match="round 1 has; go on with it"):
            begin(journal, 1)
    with Journal(path) as journal:
        assert journal.open_run(JOB, "", initial)[0] == 0
        again = journal.resume_round(JOB, 1)
        assert again == start == Start(nonces={"b": "02", "a": "01"}, known=9)
        assert again is not None and list(again.nonces) == ["b", "a"]


def test_nothing_of_a_round_stays_when_its_commit_fails(path: Path, initial: Any) -> None:
    with Journal(path) as journal:
        journal.open_run(JOB, "", initial)
        begin(journal, 1)
        commit(journal, 1)
        begin(journal, 2)
        twice = [UpdateEntry(nonce="n1", client="c0", samples=3, bytes=70)]
        with pytest.raises(JournalConflictError, match="counted before"):
            commit(journal, 2, updates=twice)
        with pytest.raises(ValueError, match="Out of range float"):
            commit(journal, 2, report={"loss": float("nan")})
        assert journal.reports(JOB) == [{"round": 1}] and journal.tensors(JOB, 2) is None
        commit(journal, 2)
        assert len(journal.rejections(JOB)) == 2


def test_round_is_committed_once_and_after_it_began(path: Path, initial: Any) -> None:
    with Journal(path) as journal:
        journal.open_run(JOB, "", initial)
        with pytest.raises(JournalConflictError, match="round 1 was not begun"):
            commit(journal, 1)
        begin(journal, 1)
        commit(journal, 1)
        for again in (
            lambda: commit(journal, 1),
            lambda: begin(journal, 1),
            lambda: journal.resume_round(JOB, 1),
        ):
            with pytest.raises(JournalConflictError, match="committed already"):
                again()


def test_old_tensors_are_let_go_when_asked(path: Path, initial: Any) -> None:
    with Journal(path, keep_tensors=2) as journal:
        journal.open_run(JOB, "", initial)
        for number in range(1, 5):
            begin(journal, number)
            commit(journal, number)
        kept = [journal.tensors(JOB, number) is not None for number in range(1, 5)]
        assert kept == [False, False, True, True]
        assert len(journal.reports(JOB)) == 4


def test_other_initial_tensors_are_refused(path: Path, initial: Any) -> None:
    with Journal(path) as journal:
        journal.open_run(JOB, "", initial)
        with pytest.raises(JournalConflictError, match="start it in a new folder"):
            journal.open_run(JOB, "", {**initial, "b": np.ones(3, np.float32)})
        assert journal.open_run("cd" * 32, "", initial)[0] == 0


def test_other_file_is_refused_and_left_as_it_was(path: Path) -> None:
    path.write_bytes(b"not a database, but long enough to be looked at" * 20)
    before = path.read_bytes()
    with pytest.raises(JournalFormatError, match="found another file"):
        Journal(path)
    assert path.read_bytes() == before
    other = path.with_name("other.sqlite")
    with sqlite3.connect(other) as database:
        database.execute("CREATE TABLE t (x)")
    database.close()
    with pytest.raises(JournalFormatError, match="found another database"):
        Journal(other)


def test_journal_of_another_version_is_refused(path: Path) -> None:
    Journal(path).close()
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 9")
    database.close()
    with pytest.raises(JournalFormatError, match="found version 9"):
        Journal(path)


def test_moments_are_kept_with_the_tensors_and_let_go_with_them(path: Path, initial: Any) -> None:
    with Journal(path, keep_tensors=1) as journal:
        journal.open_run(JOB, "", initial)
        assert journal.moments(JOB, 0) is None
        for number in (1, 2):
            begin(journal, number)
            commit(
                journal,
                number,
                updates=[UpdateEntry(nonce=f"n{number}", client="c0", samples=3, bytes=70)],
            )
        assert journal.moments(JOB, 1) is None
        kept = journal.moments(JOB, 2)
    assert kept is not None
    assert (kept["first/w"] == -2).all()
    assert kept["first/w"].dtype == np.float64


def test_answers_are_kept_until_the_round_that_used_them_is_committed(
    path: Path, initial: Any
) -> None:
    with Journal(path, keep_answers=True) as journal:
        assert journal.keeps_answers
        journal.open_run(JOB, "", initial)
        begin(journal, 1, {"a": "01", "b": "02", "c": "03"})
        journal.keep_answer(JOB, 1, "b", "02", b"second")
        journal.keep_answer(JOB, 1, "a", "01", b"first")
        journal.keep_answer(JOB, 2, "z", "09", b"of another round")
        with pytest.raises(JournalConflictError, match="an answer to nonce 02 is kept already"):
            journal.keep_answer(JOB, 1, "b", "02", b"again")
    with Journal(path, keep_answers=True) as journal:
        assert [journal.keeps(nonce) for nonce in ("01", "02", "03")] == [True, True, False]
        assert journal.kept_answer("02") == ("b", b"second")
        assert journal.kept_answers(JOB) == [
            Kept(client="b", round=1, nonce="02"),
            Kept(client="a", round=1, nonce="01"),
            Kept(client="z", round=2, nonce="09"),
        ]
        with pytest.raises(JournalConflictError, match="no answer to nonce 03 is kept"):
            journal.kept_answer("03")
        twice = [UpdateEntry(nonce="01", client="a", samples=3, bytes=5)] * 2
        with pytest.raises(JournalConflictError, match="counted before"):
            commit(journal, 1, updates=twice, settled=("01", "02", "03"))
        assert len(journal.kept_answers(JOB)) == 3, "nothing of a commit that failed stays"
        commit(journal, 1, updates=twice[:1], settled=("01", "02", "03"))
        assert [kept.nonce for kept in journal.kept_answers(JOB)] == ["09"]
        with pytest.raises(JournalConflictError, match="nonce 01 was counted before"):
            journal.keep_answer(JOB, 1, "a", "01", b"first")


def test_journal_of_the_version_before_is_refused(path: Path) -> None:
    Journal(path).close()
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 4")
    database.close()
    with pytest.raises(JournalFormatError, match="expected a journal of version 5, found"):
        Journal(path)


def test_a_new_journal_may_be_opened_by_many_at_once(tmp_path: Path) -> None:
    """By its writer, and by whoever follows the job."""
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier

    readers = 6
    barrier = Barrier(readers)

    def opened(path: Path) -> int:
        barrier.wait()
        with Journal(path) as journal:
            return len(journal.reports("ab" * 32))

    with ThreadPoolExecutor(readers) as pool:
        for number in range(15):
            path = tmp_path / f"{number}.sqlite"
            assert list(pool.map(opened, [path] * readers)) == [0] * readers


def charge_of(number: int, **changes: Any) -> Charge:
    settings: dict[str, Any] = {
        "mechanism": PoissonRound(rate=0.1, multiplier=1.25), "clip": 0.3, "seed": bytes(range(32)),
    }  # fmt: skip
    return Charge(round=number, **{**settings, **changes})


def test_a_charge_is_written_with_its_rounds_beginning_and_its_seed_erased_with_its_end(
    path: Path, initial: Any
) -> None:
    fixed = FixedRound(clients=9, drawn=3, multiplier=2.0)
    with Journal(path) as journal:
        journal.open_run(JOB, "", initial)
        journal.begin_round(JOB, 1, {}, 9, charge=charge_of(1))
        commit(journal, 1)
        journal.begin_round(JOB, 2, {}, 9, charge=charge_of(2, mechanism=fixed))
    with Journal(path) as journal:
        assert journal.charges(JOB) == [
            charge_of(1, seed=b""), charge_of(2, mechanism=fixed)
        ]  # fmt: skip
        assert journal.charges("cd" * 32) == []


def test_a_round_that_does_not_begin_is_not_charged_and_a_charge_is_never_replaced(
    path: Path, initial: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Journal(path) as journal:
        journal.open_run(JOB, "", initial)
        journal.begin_round(JOB, 1, {}, 9, charge=charge_of(1))
        with pytest.raises(JournalConflictError, match="round 1 has; go on with it"):
            journal.begin_round(JOB, 1, {}, 9, charge=charge_of(1, seed=bytes(32)))
        assert journal.charges(JOB) == [charge_of(1)]
        # ... nor does a round begin whose charge cannot be written
        monkeypatch.setattr("coordinator.journal._mechanism_text", lambda charge: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            journal.begin_round(JOB, 2, {}, 9, charge=charge_of(2))
        assert journal.resume_round(JOB, 2) is None
        assert journal.charges(JOB) == [charge_of(1)]


def header_of(client: str) -> UpdateHeader:
    return UpdateHeader(
        job=JOB, round=1, nonce="ab" * 8, client=client, codec="grid:8,1.0", samples=3,
        metrics={"loss": 0.1, "selected/0": 1 / 3},
    )  # fmt: skip


def sum_of(bits: int = 19, length: int = 50_000, **changes: Any) -> OpenedSum:
    values = np.random.default_rng(bits).integers(0, 1 << bits, length, np.uint32)
    settings: dict[str, Any] = {
        "values": values.astype(np.uint16 if bits <= 16 else np.uint32), "bits": bits,
        "members": {"b": (header_of("b"), 70), "a": (header_of("a"), 71)},
        "rejections": [REJECTION], "uplink_bytes": 141, "downlink_bytes": 300,
    }  # fmt: skip
    return OpenedSum(**{**settings, **changes})


@pytest.mark.parametrize("bits", [1, 11, 16, 17, 32])
def test_an_opened_sum_is_there_when_opened_again(path: Path, initial: Any, bits: int) -> None:
    opened = sum_of(bits, 1001)
    with Journal(path) as journal:
        journal.open_run(JOB, "", initial)
        begin(journal, 1)
        assert not journal.keeps_sum(JOB, 1) and journal.opened_sum(JOB, 1) is None
        journal.keep_sum(JOB, 1, opened)
    with Journal(path) as journal:
        assert journal.keeps_sum(JOB, 1) and not journal.keeps_sum(JOB, 2)
        found = journal.opened_sum(JOB, 1)
        assert found is not None and found.values.dtype == opened.values.dtype
        np.testing.assert_array_equal(found.values, opened.values)
        assert replace(found, values=opened.values) == opened
        assert list(found.members) == ["b", "a"]


def test_a_round_has_one_sum_and_none_once_it_is_committed(path: Path, initial: Any) -> None:
    with Journal(path) as journal:
        journal.open_run(JOB, "", initial)
        begin(journal, 1)
        journal.keep_sum(JOB, 1, sum_of())
        with pytest.raises(JournalConflictError, match="a sum of round 1 is kept already"):
            journal.keep_sum(JOB, 1, sum_of(18))
        twice = [UpdateEntry(nonce="n1", client="c0", samples=3, bytes=70)] * 2
        with pytest.raises(JournalConflictError, match="counted before"):
            commit(journal, 1, updates=twice)
        assert journal.keeps_sum(JOB, 1), "nothing of a commit that failed stays"
        commit(journal, 1)
        assert not journal.keeps_sum(JOB, 1)
        with pytest.raises(JournalConflictError, match="committed already"):
            journal.keep_sum(JOB, 1, sum_of())


def test_what_a_commit_erases_is_nowhere_on_the_disk(path: Path, initial: Any) -> None:
    """Also while the journal is open: not in the file, and not in its log of changes."""
    opened, seed = sum_of(), bytes(range(32))
    packed = pack(opened.values, opened.bits)
    pieces = [packed[at : at + 64] for at in range(0, len(packed) - 64, 4096)]

    def traces() -> int:
        whole = b"".join(file.read_bytes() for file in sorted(path.parent.iterdir()))
        return sum(piece in whole for piece in [seed, *pieces])

    with Journal(path) as journal:
        journal.open_run(JOB, "", initial)
        journal.begin_round(JOB, 1, {}, 9, charge=charge_of(1, seed=seed))
        journal.keep_sum(JOB, 1, opened)
        assert traces() > len(pieces) / 2, "it is looked for as it is written"
        commit(journal, 1)
        assert traces() == 0
