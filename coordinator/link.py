# SPDX-License-Identifier: Apache-2.0
"""What the round loop needs of a transport; the one over Flower is in `flower_link.py`."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from protocol.readiness import Readiness
from protocol.rejection import RejectionCode


class Outgoing(NamedTuple):
    """One message: to whom, "fit" or "evaluate", and the plan container."""

    client: str
    kind: str
    blob: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What comes instead of a client's answer: it failed, or was not heard of in time."""

    code: RejectionCode
    reason: str


def never() -> bool:
    """An exchange that is not closed before every answer is there."""
    return False


class Link(Protocol):
    """A way to many clients."""

    def survey(self, job: str) -> Mapping[str, Readiness]:
        """Every client that there is, by name, and what it says of itself now for a job (its
        SHA-256 in hex); of one that cannot be asked, that it is not ready, and why."""
        ...

    def exchange(
        self, outgoing: Iterable[Outgoing | None], *, closed: Callable[[], bool] = never
    ) -> Generator[tuple[str, bytes | Failure]]:
        """Send each message, and give each client's answer once, in whatever order they come.

        `outgoing` is read as messages are sent, so that not all of them need be in memory; None
        says that there is nothing to send just now, and it is read again after an answer or a
        while. `closed` is asked again and again: once it is true, the answers that have not come
        are given up, as they are when the generator is closed.
        """
        ...

    def refused(self, client: str) -> Failure | None:
        """Why an answer of this client may not be used, whatever it is; None for one that may."""
        ...
