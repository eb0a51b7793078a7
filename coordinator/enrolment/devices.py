# SPDX-License-Identifier: Apache-2.0
"""The registry of devices: who is a member, what it said of itself, what it did, who is out.

A device is one key. Its certificates come and go, its name and its key's fingerprint stay.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from coordinator.enrolment.authority import Authority, CertificateFault
from coordinator.enrolment.store import Store
from coordinator.errors import RegistryError
from protocol.keys import key_fingerprint

Facts = Mapping[str, str | int | float]

_FLUSH_S: Final = 5.0
_COLUMNS: Final = (
    "name, fingerprint, node_fingerprint, node_key, label, token, certificate, not_after, "
    "enrolled, seen, versions, capabilities, rounds, bytes_up, bytes_down, revoked, node"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A member, or a former one. Times are in seconds since 1970."""

    name: str
    fingerprint: str  # of its certificate's key, 64 hex digits
    node_fingerprint: str  # of the key that Flower knows it by, mostly the same one
    node_key: str  # PEM
    label: str  # of the token that it enrolled with
    token: str  # that token's hash
    certificate: str  # PEM, the latest
    not_after: int  # that certificate's end
    enrolled: float
    seen: float
    versions: Mapping[str, str]
    capabilities: Facts
    rounds: int = 0  # that it finished
    bytes_up: int = 0
    bytes_down: int = 0
    revoked: float | None = None
    node: str | None = None  # Flower's number for it; None before it is registered there


@dataclass(slots=True)
class _Activity:
    """What a device did since the file was last written."""

    seen: float = 0.0
    rounds: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    versions: Mapping[str, str] | None = None
    capabilities: Facts | None = None


@dataclass(slots=True)
class _Pending:
    by_name: dict[str, _Activity] = field(default_factory=dict)
    since: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Devices:
    """The devices of one store, with certificates of one authority."""

    def __init__(
        self, store: Store, authority: Authority, *, now: Callable[[], float] = time.time
    ) -> None:
        self._store = store
        self._authority = authority
        self._now = now
        self._pending = _Pending()

    def add(self, device: Device) -> bool:
        """Enter a device; False if its name or one of its keys is another's."""
        row = (
            device.name,
            device.fingerprint,
            device.node_fingerprint,
            device.node_key,
            device.label,
            device.token,
            device.certificate,
            device.not_after,
            device.enrolled,
            device.seen,
            _text(device.versions),
            _text(device.capabilities),
            device.rounds,
            device.bytes_up,
            device.bytes_down,
            device.revoked,
            device.node,
        )
        marks = ", ".join("?" * len(row))
        try:
            with self._store.transaction() as db:
                db.execute(f"INSERT INTO devices ({_COLUMNS}) VALUES ({marks})", row)
        except sqlite3.IntegrityError:
            return False
        return True

    def certify(self, name: str, certificate: str, not_after: int, *, token: str = "") -> None:
        """Note a device's new certificate, and the hash of the token that it was given for."""
        with self._store.transaction() as db:
            db.execute(
                "UPDATE devices SET certificate = ?, not_after = ?, seen = ?, "
                "token = coalesce(nullif(?, ''), token) WHERE name = ?",
                (certificate, not_after, self._now(), token, name),
            )

    def assign_node(self, name: str, node: int) -> None:
        """Note the number under which Flower knows a device."""
        with self._store.transaction() as db:
            db.execute("UPDATE devices SET node = ? WHERE name = ?", (str(node), name))

    def members_by_node(self) -> dict[int, str]:
        """The names of those who are members, by Flower's numbers."""
        query = "SELECT node, name FROM devices WHERE node IS NOT NULL AND revoked IS NULL"
        return {int(node): name for node, name in self._store.rows(query)}

    def certificates(self, names: Sequence[str]) -> dict[str, str]:
        """The latest certificates (PEM) of those of these devices that are members."""
        known = (self.by_name(name) for name in names)
        return {d.name: d.certificate for d in known if d is not None and d.revoked is None}

    def revoke(self, name: str) -> bool:
        """Shut a device out for good, from the next check on; False if it was out already.

        Raises: RegistryError for a name that nobody has.
        """
        with self._store.transaction() as db:
            if self.by_name(name) is None:
                raise RegistryError(
                    f"device {name[:80]!r}: expected the name of an enrolled device, found none "
                    "called so"
                )
            return bool(
                db.execute(
                    "UPDATE devices SET revoked = ? WHERE name = ? AND revoked IS NULL",
                    (self._now(), name),
                ).rowcount
            )

    def by_name(self, name: str) -> Device | None:
        """The device called so, revoked or not."""
        return self._one("name", name)

    def by_fingerprint(self, fingerprint: str) -> Device | None:
        """The device whose certificates are over the key with this fingerprint, revoked or not."""
        return self._one("fingerprint", fingerprint)

    def by_node(self, fingerprint: str) -> Device | None:
        """The device that Flower knows by the key with this fingerprint, revoked or not."""
        return self._one("node_fingerprint", fingerprint)

    def all(self) -> list[Device]:
        """Every device, in order of enrolment, with what it did until now."""
        self.flush()
        return [
            _device(row)
            for row in self._store.rows(f"SELECT {_COLUMNS} FROM devices ORDER BY enrolled, name")
        ]

    def check(self, certificate: str | bytes) -> Device | CertificateFault:
        """The member that shows this certificate (PEM), or what is wrong with it.

        That somebody has the certificate's key, TLS or a signature must have shown.
        *Cost* one signature to verify and one look into the file: about a millisecond.
        """
        found = self._authority.check(certificate)
        if isinstance(found, CertificateFault):
            return found
        name, key = found
        device = self.by_name(name)
        if device is None:
            return CertificateFault.UNKNOWN
        if device.fingerprint != key_fingerprint(key):
            return CertificateFault.WRONG_NAME
        return device if device.revoked is None else CertificateFault.REVOKED

    def note(
        self,
        name: str,
        *,
        rounds: int = 0,
        bytes_up: int = 0,
        bytes_down: int = 0,
        versions: Mapping[str, str] | None = None,
        capabilities: Facts | None = None,
    ) -> None:
        """A device was here and did so much more.

        Written with the next note that comes five seconds or more after the first, or by `flush`:
        many devices ask every few seconds, and a crash costs no more than a little of the counts.
        """
        now = self._now()
        with self._pending.lock:
            if not self._pending.by_name:
                self._pending.since = now
            done = self._pending.by_name.setdefault(name, _Activity())
            done.seen = now
            done.rounds += rounds
            done.bytes_up += bytes_up
            done.bytes_down += bytes_down
            done.versions = versions if versions is not None else done.versions
            done.capabilities = capabilities if capabilities is not None else done.capabilities
            due = not 0 <= now - self._pending.since < _FLUSH_S
        if due:
            self.flush()

    def flush(self) -> None:
        """Write what `note` was told; call it before the end."""
        with self._pending.lock:
            pending, self._pending.by_name = self._pending.by_name, {}
        if not pending:
            return
        rows = [
            (
                done.seen,
                done.rounds,
                done.bytes_up,
                done.bytes_down,
                None if done.versions is None else _text(done.versions),
                None if done.capabilities is None else _text(done.capabilities),
                name,
            )
            for name, done in pending.items()
        ]
        with self._store.transaction() as db:
            db.executemany(
                "UPDATE devices SET seen = max(seen, ?), rounds = rounds + ?, "
                "bytes_up = bytes_up + ?, bytes_down = bytes_down + ?, "
                "versions = coalesce(?, versions), capabilities = coalesce(?, capabilities) "
                "WHERE name = ?",
                rows,
            )

    def _one(self, column: str, value: str) -> Device | None:
        rows = self._store.rows(f"SELECT {_COLUMNS} FROM devices WHERE {column} = ?", (value,))
        return _device(rows[0]) if rows else None


def _device(row: tuple[Any, ...]) -> Device:
    names = _COLUMNS.split(", ")
    values = dict(zip(names, row, strict=True))
    for name in ("versions", "capabilities"):
        values[name] = json.loads(values[name])
    return Device(**values)


def _text(facts: Mapping[str, str] | Facts) -> str:
    return json.dumps(dict(facts), sort_keys=True, separators=(",", ":"), allow_nan=False)
