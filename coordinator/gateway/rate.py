# SPDX-License-Identifier: Apache-2.0
"""How often one address may ask: a bucket of tokens each, for a bounded number of addresses."""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

_MOST_ADDRESSES: Final = 65_536


class RateLimit:
    """`burst` requests at once, then `per_s` each second."""

    def __init__(
        self, burst: int, per_s: float, *, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._burst = float(burst)
        self._per_s = per_s
        self._now = now
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_s(self, address: str) -> float:
        """Takes a token, and gives 0; or the seconds until there is one."""
        who, now = _network(address), self._now()
        tokens, since = self._buckets.pop(who, (self._burst, now))
        tokens = min(self._burst, tokens + (now - since) * self._per_s)
        wait = max(0.0, (1.0 - tokens) / self._per_s)
        self._buckets[who] = (tokens if wait else tokens - 1.0, now)
        if len(self._buckets) > _MOST_ADDRESSES:
            self._buckets.popitem(last=False)
        return wait


def _network(address: str) -> str:
    """An IPv6 caller has a whole /64 to itself, so that counts as one address."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if found.version == 4:
        return address
    return str(ipaddress.ip_network((found, 64), strict=False))
