# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from coordinator.gateway import rate
from coordinator.gateway.rate import RateLimit


def test_burst_then_one_at_a_time() -> None:
    now = [0.0]
    limit = RateLimit(3, 0.5, now=lambda: now[0])
    assert [limit.wait_s("1.2.3.4") for _ in range(4)] == [0, 0, 0, 2]
    now[0] = 1.0
    assert limit.wait_s("1.2.3.4") == 1.0
    now[0] = 2.0
    assert limit.wait_s("1.2.3.4") == 0
    assert limit.wait_s("1.2.3.4") == 2.0
    assert limit.wait_s("1.2.3.5") == 0


def test_ipv6_callers_of_one_network_are_one() -> None:
    limit = RateLimit(1, 1.0, now=lambda: 0.0)
    assert limit.wait_s("2001:db8:0:1::1") == 0
    assert limit.wait_s("2001:db8:0:1:ffff::2%eth0") == 1.0
    assert limit.wait_s("2001:db8:0:2::1") == 0


def test_addresses_are_forgotten_from_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate, "_MOST_ADDRESSES", 2)
    limit = RateLimit(1, 1.0, now=lambda: 0.0)
    assert [limit.wait_s(address) for address in "abc"] == [0, 0, 0]
    assert len(limit._buckets) == 2
    assert limit.wait_s("a") == 0 and limit.wait_s("c") == 1
