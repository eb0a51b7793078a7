# SPDX-License-Identifier: Apache-2.0
"""Tokens: what an operator hands to a device, so that it may enrol.

A token is 256 random bits; the file holds its SHA-256 only, which is enough for such a secret.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from coordinator.enrolment.authority import plain_label
from coordinator.enrolment.store import Store
from coordinator.errors import RegistryError
from protocol.enrolment import TOKEN_DIGITS

HOUR_S: Final = 3_600
MAX_QUOTA: Final = 100_000
MAX_TOKEN_LIFETIME_S: Final = 30 * 24 * HOUR_S


class TokenFault(StrEnum):
    """Why a token was not taken: for the log alone, a caller hears the same of each."""

    UNKNOWN = "unknown token"
    USED = "used-up token"
    EXPIRED = "expired token"


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """What is known of a token; not the token itself."""

    hash: str  # SHA-256, 64 hex digits
    label: str
    quota: int  # devices that may enrol with it
    used: int
    created: float  # seconds since 1970
    expires: float


class Tokens:
    """The tokens of one store."""

    def __init__(self, store: Store, *, now: Callable[[], float] = time.time) -> None:
        self._store = store
        self._now = now

    def create(self, label: str, *, quota: int = 1, lifetime_s: float = HOUR_S) -> str:
        """A new token, told this once. Devices that use it are called after `label`.

        Raises: AuthorityError for a label that no name can begin with, RegistryError for a quota
            or lifetime out of bounds.
        """
        plain_label("label", label)
        if not 1 <= quota <= MAX_QUOTA:
            raise RegistryError(f"quota: expected 1 to {MAX_QUOTA} devices, found {quota}")
        if not 0 < lifetime_s <= MAX_TOKEN_LIFETIME_S:
            raise RegistryError(
                f"lifetime: expected at most {MAX_TOKEN_LIFETIME_S} seconds, found {lifetime_s:g}"
            )
        token = secrets.token_hex(TOKEN_DIGITS // 2)
        now = self._now()
        row = (token_hash(token), label, quota, 0, now, now + lifetime_s)
        with self._store.transaction() as db:
            db.execute("INSERT INTO tokens VALUES (?, ?, ?, ?, ?, ?)", row)
        return token

    def redeem(self, token: str) -> Token | TokenFault:
        """Counts one use of a token, once for all threads and processes.

        Within a transaction the use is undone when that is.
        """
        key, now = token_hash(token), self._now()
        with self._store.transaction() as db:
            changed = db.execute(
                "UPDATE tokens SET used = used + 1 WHERE hash = ? AND used < quota AND expires > ?",
                (key, now),
            ).rowcount
            found = self._store.rows("SELECT * FROM tokens WHERE hash = ?", (key,))
        if not found:
            return TokenFault.UNKNOWN
        known = _token(found[0])
        if changed:
            return known
        return TokenFault.USED if known.used >= known.quota else TokenFault.EXPIRED

    def all(self) -> list[Token]:
        """Every token there ever was, the oldest first."""
        return [_token(row) for row in self._store.rows("SELECT * FROM tokens ORDER BY created")]


def token_hash(token: str) -> str:
    """What stands for a token in files and logs, 64 hex digits."""
    return hashlib.sha256(token.encode()).hexdigest()


def _token(row: tuple[str, str, int, int, float, float]) -> Token:
    key, label, quota, used, created, expires = row
    return Token(hash=key, label=label, quota=quota, used=used, created=created, expires=expires)
