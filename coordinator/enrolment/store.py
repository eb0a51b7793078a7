# SPDX-License-Identifier: Apache-2.0
"""The one SQLite file of tokens, devices, jobs and the audit log.

Any number of threads and processes may use it: a transaction takes the file for itself, and one
within another is a part of it, so that what several modules write is committed at once.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self

from coordinator.errors import RegistryError
from protocol.owned_files import PRIVATE

_APPLICATION_ID: Final = 0x464C4445  # "FLDE": this file is one of ours
_WAIT_S: Final = 30.0  # for another process's transaction
# One script a version: an older file is brought up to date when it is opened.
_VERSIONS: Final = (
    """
CREATE TABLE tokens (
    hash TEXT PRIMARY KEY, label TEXT NOT NULL, quota INTEGER NOT NULL, used INTEGER NOT NULL,
    created REAL NOT NULL, expires REAL NOT NULL
);
CREATE TABLE devices (
    name TEXT PRIMARY KEY, fingerprint TEXT NOT NULL UNIQUE, node_fingerprint TEXT NOT NULL UNIQUE,
    node_key TEXT NOT NULL, label TEXT NOT NULL, token TEXT NOT NULL, certificate TEXT NOT NULL,
    not_after INTEGER NOT NULL, enrolled REAL NOT NULL, seen REAL NOT NULL,
    versions TEXT NOT NULL, capabilities TEXT NOT NULL,
    rounds INTEGER NOT NULL DEFAULT 0, bytes_up INTEGER NOT NULL DEFAULT 0,
    bytes_down INTEGER NOT NULL DEFAULT 0, revoked REAL
);
CREATE TABLE audit (
    number INTEGER PRIMARY KEY, time REAL NOT NULL, event TEXT NOT NULL, subject TEXT NOT NULL,
    detail TEXT NOT NULL, hash TEXT NOT NULL
);
CREATE TRIGGER audit_stays BEFORE UPDATE ON audit
    BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;
CREATE TRIGGER audit_grows BEFORE DELETE ON audit
    BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;
""",
    # Flower's numbers of nodes do not fit into SQLite's integers.
    """
ALTER TABLE devices ADD COLUMN node TEXT;
CREATE TABLE jobs (
    name TEXT PRIMARY KEY, hash TEXT NOT NULL UNIQUE, submitted REAL NOT NULL,
    wanted INTEGER NOT NULL, starts INTEGER NOT NULL DEFAULT 0,
    ended REAL, outcome TEXT NOT NULL DEFAULT '', reason TEXT NOT NULL DEFAULT ''
);
""",
)


class Store:
    """The open file. Use it as a context manager."""

    def __init__(self, path: Path) -> None:
        """Open, or make, the file; its owner alone may read it.

        Raises: RegistryError when the file is something else, or cannot be made.
        """
        self.path = path
        self._lock = threading.RLock()
        self._depth = 0
        try:
            # SQLite gives its -wal and -shm files the mode of this one.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, PRIVATE))
            self._db = sqlite3.connect(
                path, isolation_level=None, check_same_thread=False, timeout=_WAIT_S
            )
        except (OSError, sqlite3.Error) as error:
            raise RegistryError(f"{path}: the registry cannot be opened ({error})") from error
        try:
            self._prepare()
        except sqlite3.OperationalError as error:
            self._db.close()
            raise RegistryError(f"{path}: the registry cannot be opened ({error})") from error
        except sqlite3.Error as error:
            self._db.close()
            raise RegistryError(
                f"{path}: expected a registry, found another file ({error})"
            ) from error
        except RegistryError:
            self._db.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All that is written within is on disk when it ends, or nothing after an exception.

        Raises: RegistryError when the file cannot be written, as on a full disk.
        """
        with self._lock:
            if self._depth:
                yield self._db
                return
            self._depth += 1
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except BaseException as error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                if isinstance(error, sqlite3.OperationalError):
                    raise RegistryError(
                        f"{self.path}: cannot be written ({error}); nothing was changed"
                    ) from error
                raise
            finally:
                self._depth -= 1

    def rows(self, query: str, arguments: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """What a SELECT gives."""
        with self._lock:
            return self._db.execute(query, arguments).fetchall()

    def _prepare(self) -> None:
        # Text that was meddled with is read, and found by its hash, in place of an error.
        self._db.text_factory = lambda raw: raw.decode(errors="replace")
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")  # a spent token stays spent in a power cut
        with self.transaction():
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            (application,) = self._db.execute("PRAGMA application_id").fetchone()
            (tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            newest = len(_VERSIONS)
            if tables and (application != _APPLICATION_ID or not 1 <= version <= newest):
                raise RegistryError(
                    f"{self.path}: expected a registry of version 1 to {newest}, found "
                    + (f"version {version}" if application == _APPLICATION_ID else "another file")
                )
            for script in _VERSIONS[version if tables else 0 :]:
                for statement in _statements(script):
                    self._db.execute(statement)
            self._db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            self._db.execute(f"PRAGMA user_version = {newest}")


def _statements(script: str) -> Iterator[str]:
    """One by one: `executescript` would commit the transaction that they are a part of."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
