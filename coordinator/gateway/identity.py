# SPDX-License-Identifier: Apache-2.0
"""Which device a request is from, decided from its headers before a byte of its body is read.

Flower signs the time of a request and not its body. So a time is taken once: headers that were seen
on one request are worth nothing on another.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from coordinator.errors import RefusedError
from coordinator.gateway.settings import Refuse
from protocol.errors import SignatureError
from protocol.node_headers import MAX_AGE_S, MAX_AHEAD_S, read_claim, verify_claim

_MOST_TIMES: Final = 8_192  # of one device in MAX_AGE_S: 26 requests each second
_SWEEP_S: Final = 60.0


@dataclass(slots=True)
class _Times:
    """The signed times of one key, in microseconds since 1970."""

    floor: int  # what is not later is refused
    known: set[int] = field(default_factory=set)
    order: list[int] = field(default_factory=list)

    def take(self, moment: int) -> bool:
        if moment <= self.floor or moment in self.known:
            return False
        self.known.add(moment)
        heapq.heappush(self.order, moment)
        if len(self.order) > _MOST_TIMES:
            self.forget_until(self.order[0])
        return True

    def forget_until(self, moment: int) -> None:
        while self.order and self.order[0] <= moment:
            self.known.discard(heapq.heappop(self.order))
        self.floor = max(self.floor, moment)


class Doorkeeper:
    """Lets a request in once, if its key signed its time and the owner does not refuse the key."""

    def __init__(self, refuse: Refuse, *, now: Callable[[], float] = time.time) -> None:
        """`now` gives seconds since 1970."""
        self._refuse = refuse
        self._now = now
        self._times: dict[bytes, _Times] = {}
        self._started = self._swept = now()

    def admit(self, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
        """The public key (PEM) of the device that sends these headers.

        Raises: RefusedError 401, at which a SuperNode ends, and 503, at which it tries again.
        """
        try:
            claim = read_claim(headers)
            # Asked before the costly part: a stranger's request ends here.
            if reason := self._refuse(claim.public_key):
                raise RefusedError(reason, status=401)
            now = self._now()
            verify_claim(claim, now)
        except SignatureError as error:
            raise RefusedError(str(error), status=401) from None
        if claim.signed_at < self._started:
            # Those taken before the start are forgotten, so that none of them counts any more.
            raise RefusedError("signed before the gateway started; sign again", status=503)
        self._sweep(now)
        times = self._times.setdefault(claim.public_key, _Times(floor=0))
        if not times.take(round(claim.signed_at * 1e6)):
            raise RefusedError("the headers were used before; sign each request", status=401)
        return claim.public_key

    def _sweep(self, now: float) -> None:
        if now - self._swept < _SWEEP_S:
            return
        self._swept = now
        too_old = round((now - MAX_AGE_S - MAX_AHEAD_S) * 1e6)
        for key, times in list(self._times.items()):
            times.forget_until(too_old)
            if not times.order:
                del self._times[key]
