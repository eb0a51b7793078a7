# SPDX-License-Identifier: Apache-2.0
"""Whoever looks on while rounds are played: what is waited for, who was asked, who has answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from coordinator.errors import NoClientsError

_NAMED = 5


class Watch(Protocol):
    """Told as things happen; what it raises ends the run, which may be gone on with later."""

    def waits(self, round: int, have: int, need: int, why: Mapping[str, str]) -> None:
        """A round does not begin: `have` clients of the `need` that it wants could take part;
        `why` says of each other client what keeps it."""
        ...

    def asked(self, round: int, clients: Sequence[str]) -> None:
        """Plans go out to these."""
        ...

    def answered(self, round: int, client: str, have: int) -> None:
        """A client's answer has come, not yet looked into; `have` have come so far."""
        ...


class Unattended:
    """Nobody looks on, and so nobody could mend what a round waits for: it ends the run."""

    def waits(self, round: int, have: int, need: int, why: Mapping[str, str]) -> None:
        """Raises: NoClientsError."""
        wanted = "one client" if need == 1 else f"{need} clients"
        found = f"{have} can take part" if why else "none is connected"
        named = [f"{client}: {reason}" for client, reason in sorted(why.items())[:_NAMED]]
        more = [f"and {len(why) - _NAMED} more"] if len(why) > _NAMED else []
        reasons = f" ({'; '.join([*named, *more])})" if why else ""
        raise NoClientsError(f"round {round}: expected at least {wanted}, {found}{reasons}")

    def asked(self, round: int, clients: Sequence[str]) -> None:
        """Nothing."""

    def answered(self, round: int, client: str, have: int) -> None:
        """Nothing."""
