# SPDX-License-Identifier: Apache-2.0
"""`disk_full_survived`: what is written whole or not at all when there is no room, and goes on to
the same bits when there is.

Each scenario runs twice: with writes that fail as on a full disk, everywhere; and run as a script,
on a small file system of its own that is really full, where this user may mount one.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shlex
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "coordinator"))

from conftest import FakeLink  # type: ignore[attr-defined]  # noqa: E402

from client_sdk.bundle_cache import BundleCache  # noqa: E402
from client_sdk.errors import ClientError, FetchError, MemoryFileError  # noqa: E402
from client_sdk.identity import Identity  # noqa: E402
from client_sdk.memory import FolderMemory  # noqa: E402
from client_sdk.outbox import Outbox, answer_once  # noqa: E402
from coordinator.deployment import Deployment, Settings  # noqa: E402
from coordinator.errors import RegistryError  # noqa: E402
from coordinator.job import Job  # noqa: E402
from coordinator.journal import Journal  # noqa: E402
from coordinator.rounds import run_rounds  # noqa: E402
from coordinator.sections import DataSection, RoundsSection, UpdateSection  # noqa: E402
from protocol.enrolment import Enrolled, unpack_enrolment_answer  # noqa: E402
from protocol.files import SIGNER_NAME  # noqa: E402
from protocol.plan import Plan, pack_plan  # noqa: E402
from protocol.tensors import ParamSpec  # noqa: E402

CLIENTS = ("ada", "ben", "cyd")
ROUNDS, FULL_IN = 5, 3
SIZE = 60_000  # numbers of a tensor: what is written needs room of its own
JOB = Job(
    data=DataSection(clients=3, held_out=0.0),
    rounds=RoundsSection(count=ROUNDS, evaluate_every=ROUNDS),
    update=UpdateSection(codec="one-bit", error_feedback=True),
)
INITIAL = {"w": np.linspace(-1, 1, SIZE, dtype=np.float32).reshape(-1, 100)}
MIB = 1 << 20


class Disk(Protocol):
    """Where a scenario writes."""

    def fill(self) -> None:
        """From now on there is no room."""

    def free(self) -> None:
        """There is again."""


class RealDisk:
    """A file system of its own."""

    def __init__(self, folder: Path) -> None:
        self._ballast = folder / "ballast"

    def fill(self) -> None:
        with self._ballast.open("ab", buffering=0) as file:
            try:
                while True:
                    file.write(b"\0" * 4096)
            except OSError as error:
                assert error.errno == errno.ENOSPC, error

    def free(self) -> None:
        self._ballast.unlink()


class FailingWrites:
    """fsync, without which nothing of ours is done, fails; SQLite's files cannot grow."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self._connections: list[sqlite3.Connection] = []
        self._full = False
        connect, fsync = sqlite3.connect, os.fsync

        def connected(*given: Any, **options: Any) -> sqlite3.Connection:
            self._connections.append(connect(*given, **options))
            return self._connections[-1]

        def synced(descriptor: int) -> None:
            if self._full and os.readlink(f"/proc/self/fd/{descriptor}").startswith(str(folder)):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)

        patch.setattr(sqlite3, "connect", connected)
        patch.setattr(os, "fsync", synced)

    def fill(self) -> None:
        self._full = True
        for each in self._open():
            (pages,) = each.execute("PRAGMA page_count").fetchone()
            each.execute(f"PRAGMA max_page_count = {pages}")

    def free(self) -> None:
        self._full = False
        for each in self._open():
            each.execute("PRAGMA max_page_count = 1000000000")

    def _open(self) -> Iterator[sqlite3.Connection]:
        for each in self._connections:
            try:
                each.execute("SELECT 1")
            except sqlite3.ProgrammingError:
                continue  # closed
            yield each


# The coordinator's journal


def play(folder: Path, journal: Journal, on_round: Callable[[int], object]) -> None:
    run_rounds(
        JOB, ParamSpec.of(INITIAL), INITIAL,
        FakeLink(JOB, CLIENTS, memory=folder / "memory", initial=INITIAL), journal,
        lambda report: on_round(report.round), lambda tensors, offset: {},
    )  # fmt: skip


def bits(journal: Journal) -> list[bytes]:
    found = [journal.tensors(JOB.hash(), number) for number in range(1, ROUNDS + 1)]
    return [b"".join(each[name].tobytes() for name in sorted(each)) for each in found if each]


def journal_commits(folder: Path, elsewhere: Path, disk: Disk, *, keep_answers: bool) -> None:
    with Journal(elsewhere / "journal", keep_tensors=0) as undisturbed:
        play(elsewhere, undisturbed, lambda number: None)
        expected = bits(undisturbed)
    path = folder / "journal"

    def fill_after(number: int) -> None:
        if number == FULL_IN - 1:
            disk.fill()

    # Clients are elsewhere: theirs is another disk.
    with Journal(path, keep_tensors=0, keep_answers=keep_answers) as journal:
        with pytest.raises(sqlite3.OperationalError, match="full"):
            play(elsewhere / "again", journal, fill_after)
        # Of a process that lives on: what was begun is over, and reads go on.
        assert not journal._db.in_transaction
        assert len(bits(journal)) == FULL_IN - 1
        with pytest.raises(sqlite3.OperationalError, match="full"):
            play(elsewhere / "again", journal, lambda number: None)
    require_sound(path)
    # Neither this journal nor a new one is taken for something that a job should fail for.
    for each in (path, folder / "another"):
        with contextlib.suppress(sqlite3.OperationalError):
            Journal(each).close()
    disk.free()
    with Journal(path, keep_tensors=0, keep_answers=keep_answers) as journal:
        play(elsewhere / "again", journal, lambda number: None)
        assert bits(journal) == expected
        counted = journal._db.execute("SELECT round, client FROM updates ORDER BY 1, 2").fetchall()
        assert counted == [(n, name) for n in range(1, ROUNDS + 1) for name in CLIENTS]
        assert journal.kept_answers(JOB.hash()) == []
    require_sound(path)


def require_sound(path: Path) -> None:
    db = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    finally:
        db.close()


# The registry


def registry_enrols(folder: Path, elsewhere: Path, disk: Disk) -> None:
    settings = Settings(name="ward", addresses=("127.0.0.1",))
    with Deployment.create(folder / "deployment", settings) as deployment:
        enrolment = deployment.enrolment
        token = enrolment.create_token("bed", quota=20)
        identity = Identity(elsewhere / "device")
        request = identity.enrol_request(token)
        names = [f"device-{number}" for number in range(12)]
        others = [Identity(elsewhere / name).enrol_request(token) for name in names]
        disk.fill()
        # What SQLite has room for in its last page it may still take.
        for other in others:
            try:
                enrolment.enrol(other)
            except RegistryError as error:
                assert "nothing was changed" in str(error)
                break
        else:
            raise AssertionError("the registry took every device, with no room for any")
        (before,) = enrolment.tokens.all()
        members = [device.name for device in enrolment.devices.all()]
        assert len(members) == before.used, "whoever was not taken has spent nothing"
        with pytest.raises(RegistryError, match="full"):
            enrolment.enrol(request)
        disk.free()
        answer = enrolment.enrol(request)
        held = identity.join(answer, fingerprint=deployment.authority.fingerprint)
        (after,) = enrolment.tokens.all()
        assert after.used == before.used + 1
        again = unpack_enrolment_answer(enrolment.enrol(request))
        assert isinstance(again, Enrolled)
        assert again.certificate == held.certificate, "asked again it is given the same"
        assert enrolment.audit.verify() is None
    require_sound(folder / "deployment" / "registry.sqlite")
    with Deployment(folder / "deployment") as deployment:
        assert deployment.enrolment.devices.by_name(held.device) is not None


# A device


def outbox_keeps(folder: Path, elsewhere: Path, disk: Disk) -> None:
    plan = Plan(
        job="ab" * 32, round=3, nonce="cd" * 16, client="c1", downlink_codec="float32",
        uplink_codec="float32", task="fit", learning_rate=0.5, local_epochs=1, seed=9,
        max_update_bytes=MIB,
    )  # fmt: skip
    blob, update = pack_plan(plan, b""), np.random.default_rng(3).bytes(200_000)
    outbox, trained = Outbox(folder / "outbox"), 0

    def answer(_: bytes) -> bytes:
        nonlocal trained
        trained += 1
        return update

    disk.fill()
    assert answer_once(blob, outbox, answer) == update, "it is sent, though it cannot be kept"
    assert outbox.entries() == [] and not list(folder.rglob("*.partial"))
    memory = FolderMemory(folder / "memory")
    with pytest.raises(MemoryFileError, match="make room"):
        memory.save("residual", 3, INITIAL)
    assert memory.latest("residual", before=4) == {} and not list(folder.rglob("*.partial"))
    disk.free()
    for _ in range(2):
        assert answer_once(blob, Outbox(folder / "outbox"), answer) == update
    assert trained == 2, "once without room, and once for good"
    assert [entry.attempt.round for entry in outbox.entries()] == [3]
    memory.save("residual", 3, INITIAL)
    assert np.array_equal(memory.latest("residual", before=4)["w"], INITIAL["w"])


def device_fetches(
    folder: Path, elsewhere: Path, disk: Disk, bundle: Path, job: str, key: str
) -> None:
    cache = BundleCache(folder / "bundles", pause_s=0.0)
    total = asked = 0

    @contextmanager
    def download(_: str, name: str, *, first: int = 0, etag: str = "") -> Iterator[Any]:
        nonlocal total, asked
        content = (bundle / name).read_bytes()
        total += len(content) - first
        asked += 1

        class Part:
            def __init__(self) -> None:
                self.first, self.size, self._at = first, len(content), first

            def read(self, most: int) -> bytes:
                if asked > 4 and fills:
                    disk.fill()  # in the middle, after all looked as if there were room
                    fills.clear()
                part = content[self._at : self._at + min(most, 4096)]
                self._at += len(part)
                return part

        yield Part()

    fills = [True]
    with pytest.raises(FetchError, match="cannot be written"):
        cache.get(job, key, download)
    assert not fills, "the disk was full while it fetched"
    assert cache.held() == [] and cache.opened(job, key) is None
    with pytest.raises(ClientError):
        cache.get(job, key, download)
    disk.free()
    found = cache.get(job, key, download)
    assert {each: (found.folder / each).read_bytes() for each in found.manifest.files} == {
        each: (bundle / each).read_bytes() for each in found.manifest.files
    }
    assert [each.job for each in cache.held()] == [job]
    assert not list((folder / "bundles").glob("*.partial"))


SCENARIOS: dict[str, Callable[..., None]] = {
    "journal_commits": functools.partial(journal_commits, keep_answers=False),
    "journal_keeps_answers": functools.partial(journal_commits, keep_answers=True),
    "registry_enrols": registry_enrols,
    "outbox_keeps": outbox_keeps,
    "device_fetches": device_fetches,
}


@pytest.fixture
def asked_of(make_bundle: Callable[..., Any]) -> Callable[[str], list[str]]:
    """What a scenario needs beside its folders."""

    def given(scenario: str) -> list[str]:
        if scenario != "device_fetches":
            return []
        bundle = make_bundle("lora").bundle
        signer = (bundle.folder / SIGNER_NAME).read_text().strip()
        return [str(bundle.folder), bundle.manifest.job, signer]

    return given


def run(scenario: str, folder: Path, elsewhere: Path, disk: Disk, given: list[str]) -> None:
    for each in (folder, elsewhere):
        each.mkdir(parents=True, exist_ok=True)
    more: list[Any] = [Path(given[0]), *given[1:]] if given else []
    SCENARIOS[scenario](folder, elsewhere, disk, *more)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_work_goes_on_after_writes_that_failed(
    scenario: str, asked_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = asked_of(scenario)
    disk = FailingWrites(tmp_path / "a", monkeypatch)
    run(scenario, tmp_path / "a", tmp_path / "b", disk, given)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_work_goes_on_after_a_disk_was_full(scenario: str, asked_of: Any, tmp_path: Path) -> None:
    given = asked_of(scenario)
    place = tmp_path / "disk"
    place.mkdir()
    words = [sys.executable, __file__, scenario, str(place), str(tmp_path / "elsewhere"), *given]
    # Small, and yet with room for the undisturbed part of every scenario.
    mount = f"mount -t tmpfs -o size=16m none {shlex.quote(str(place))}"
    done = subprocess.run(
        [*own_mounts(), "sh", "-c", f"{mount} && exec {shlex.join(words)}"],
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "survived" in done.stdout


@functools.cache
def own_mounts() -> tuple[str, ...]:
    """What gives a process file systems of its own; a test is skipped where nothing does."""
    said = "no unshare"
    if shutil.which("unshare"):
        for options in (["--mount"], ["--user", "--map-root-user", "--mount"]):
            words = ["unshare", *options]
            try_it = [*words, "mount", "-t", "tmpfs", "none", "/mnt"]
            done = subprocess.run(try_it, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return tuple(words)
            said = done.stderr.strip()
    pytest.skip(f"this user may not mount a file system here: {said}")


if __name__ == "__main__":
    name, place, other = sys.argv[1:4]
    run(name, Path(place), Path(other), RealDisk(Path(place)), sys.argv[4:])
    print("survived")
