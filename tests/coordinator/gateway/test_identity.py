# SPDX-License-Identifier: Apache-2.0
"""Who is let in, how often, and what is remembered of it."""

from __future__ import annotations

import datetime
import time
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from coordinator.errors import RefusedError
from coordinator.gateway import identity
from coordinator.gateway.identity import Doorkeeper
from protocol.node_headers import node_headers, node_public_key

KEY = ec.generate_private_key(ec.SECP384R1())
START = 1_800_000_000.0


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def signed(at: float, key: ec.EllipticCurvePrivateKey = KEY) -> list[tuple[bytes, bytes]]:
    moment = datetime.datetime.fromtimestamp(at, datetime.UTC)
    return [(name.encode(), value.encode()) for name, value in node_headers(key, moment).items()]


def refused(keeper: Doorkeeper, headers: Any) -> tuple[int, str]:
    with pytest.raises(RefusedError) as found:
        keeper.admit(headers)
    return found.value.status, str(found.value)


def test_key_of_an_admitted_request_is_given(clock: Clock) -> None:
    keeper = Doorkeeper(lambda key: "", now=clock)
    clock.now += 1
    assert keeper.admit(signed(clock.now)) == node_public_key(KEY.public_key())


def test_owner_is_asked_before_the_signature_is_looked_at(clock: Clock) -> None:
    asked = []

    def refuse(key: bytes) -> str:
        asked.append(key)
        return "the device was revoked"

    headers = dict(signed(START)) | {b"flwr-signature": b"AAAA"}
    keeper = Doorkeeper(refuse, now=clock)
    assert refused(keeper, headers.items()) == (401, "the device was revoked")
    assert asked == [node_public_key(KEY.public_key())]


def test_time_of_a_key_is_taken_once_but_each_key_has_its_own(clock: Clock) -> None:
    keeper = Doorkeeper(lambda key: "", now=clock)
    other = ec.generate_private_key(ec.SECP256R1())
    clock.now += 10
    keeper.admit(signed(clock.now))
    keeper.admit(signed(clock.now, other))
    keeper.admit(signed(clock.now - 5))  # two requests may overtake each other
    # A new signature of the same time is the same request: ECDSA signs differently each time.
    assert refused(keeper, signed(clock.now))[1].startswith("the headers were used before")
    clock.now += 290
    assert refused(keeper, signed(clock.now - 290))[0] == 401


def test_time_before_the_start_has_to_be_signed_again(clock: Clock) -> None:
    headers = signed(clock.now - 1)
    Doorkeeper(lambda key: "", now=lambda: START - 2).admit(headers)
    after_a_restart = Doorkeeper(lambda key: "", now=clock)
    assert refused(after_a_restart, headers)[0] == 503


def test_what_is_too_old_to_be_valid_is_forgotten(clock: Clock) -> None:
    keeper = Doorkeeper(lambda key: "", now=clock)
    clock.now += 1
    for _ in range(100):
        keeper.admit(signed(clock.now))
        clock.now += 10
    (times,) = keeper._times.values()
    assert len(times.known) == len(times.order) < 45
    clock.now += 1_000
    keeper.admit(signed(clock.now, ec.generate_private_key(ec.SECP256R1())))
    assert len(keeper._times) == 1


def test_device_that_signs_too_often_loses_its_oldest_times(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "_MOST_TIMES", 5)
    keeper = Doorkeeper(lambda key: "", now=clock)
    clock.now += 100
    for number in range(8):
        keeper.admit(signed(START + 1 + number))
    # Nothing that was forgotten can be used again.
    for number in range(8):
        assert refused(keeper, signed(START + 1 + number))[0] == 401


def test_admitting_takes_about_a_millisecond() -> None:
    keeper = Doorkeeper(lambda key: "", now=time.time)
    many = [signed(time.time() + 0.001 * number) for number in range(1, 51)]
    begun = time.perf_counter()
    for headers in many:
        keeper.admit(headers)
    assert (time.perf_counter() - begun) / 50 < 0.05
