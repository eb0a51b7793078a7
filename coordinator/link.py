# SPDX-License-Identifier: Apache-2.0
"""What the round loop needs of a transport; the one over Flower is in `server_app.py`."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

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


class Link(Protocol):
    """A way to many clients."""

    def node_ids(self) -> Sequence[str]:
        """The clients that can be asked, by name."""
        ...

    def exchange(self, outgoing: Iterable[Outgoing]) -> Generator[tuple[str, bytes | Failure]]:
        """Send each message, and give each client's answer once, in whatever order they come.

        `outgoing` is read as messages are sent, so that not all of them need be in memory. Whoever
        closes the generator gives up the answers that have not come.
        """
        ...
