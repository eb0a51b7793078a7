# SPDX-License-Identifier: Apache-2.0
"""Whether a device is still at work on what it was asked: one that was restarted never answers.

Flower hands a message over once, and a device that is killed forgets it; it is connected again soon
and looks like one that is slow. So it is asked, at growing intervals. When it says that it is at
work on nothing its answer may be on its way: it has some seconds for that, and is then given up.

Times are in seconds, of one clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class _Known:
    """What is known of one message's work."""

    ask_at: float
    pause_s: float
    idle_since: float | None = None


@dataclass(slots=True, kw_only=True)
class Liveness:
    """Of the messages of one exchange, by their keys."""

    first_s: float = 30.0  # from sending to the first question
    growth: float = 2.0
    longest_s: float = 300.0
    grace_s: float = 15.0  # for an answer that is on its way
    _known: dict[str, _Known] = field(default_factory=dict)

    def due(self, waiting: Iterable[str], now: float) -> list[str]:
        """Messages about whose work it is time to ask; each is told once a question."""
        waited = set(waiting)
        self._known = {key: known for key, known in self._known.items() if key in waited}
        found = []
        for key in sorted(waited):
            known = self._known.setdefault(
                key, _Known(ask_at=now + self.first_s, pause_s=self.first_s)
            )
            if now >= known.ask_at:
                known.pause_s = min(known.pause_s * self.growth, self.longest_s)
                known.ask_at = now + known.pause_s
                found.append(key)
        return found

    def told(self, key: str, working: bool | None, now: float) -> None:
        """What the device of a message says; None where it does not know."""
        if (known := self._known.get(key)) is None:
            return
        if working is False:
            known.idle_since = now if known.idle_since is None else known.idle_since
        else:
            known.idle_since = None

    def lost(self, now: float) -> list[str]:
        """Messages that will not be answered."""
        return [
            key
            for key, known in self._known.items()
            if known.idle_since is not None and now - known.idle_since > self.grace_s
        ]
