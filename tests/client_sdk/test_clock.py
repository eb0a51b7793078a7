# SPDX-License-Identifier: Apache-2.0
"""A device whose clock is a day off: it trains, or says by how much, and accepts nothing more."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregation.codecs import codec_named
from client_sdk import device as device_module
from client_sdk import participant as participant_module
from client_sdk.errors import ClockError, RefusedError
from client_sdk.gateway import Gateway
from client_sdk.home import Home
from client_sdk.identity import Identity
from client_sdk.participant import Participant
from coordinator.enrolment.authority import CertificateFault
from protocol.plan import Plan, pack_plan
from protocol.readiness import Survey, pack_survey, unpack_readiness
from protocol.update import unpack_update

DAY = 86_400
OFF = pytest.mark.parametrize("off", [DAY, -DAY], ids=["a day ahead", "a day behind"])
SAID = r"clock off by 86\d\d\d s: this device is (ahead|behind) of the coordinator"


@pytest.fixture
def shift(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """`shift(seconds)`: the clock of all that is a device's in this process."""

    def set_off(seconds: float) -> None:
        def clock() -> float:
            return time.time() + seconds

        class Clock:
            """`time` as those modules see it."""

            time = staticmethod(clock)

            def __getattr__(self, name: str) -> Any:
                return getattr(time, name)

        for module in (device_module, participant_module):
            monkeypatch.setattr(module, "time", Clock())
            monkeypatch.setattr(module, "Gateway", functools.partial(Gateway, clock=clock))

    return set_off


@pytest.fixture
def device(served: Any, tmp_path: Path) -> Any:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "own.npz", images=images, labels=np.arange(20) % 10)
    made = served.enrolled(tmp_path / "device")
    made.configure(data=tmp_path / "own.npz")
    return made


def surveyed(device: Any, job: str) -> Any:
    blob = pack_survey(Survey(job=job))
    return unpack_readiness(Participant(Home(device.home.folder)).survey(blob))


@OFF
def test_a_device_that_runs_says_it_and_starts_nothing(
    off: float, device: Any, shift: Any, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    started: list[str] = []
    monkeypatch.setattr(device_module.SuperNode, "start", lambda self: started.append("SuperNode"))
    shift(off)
    running = threading.Thread(target=device.run)
    running.start()
    try:
        deadline = time.monotonic() + 20
        while "trying again" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        device.stop()
        running.join(20)
    assert not running.is_alive() and not started
    said = [record for record in caplog.records if "clock off by" in record.getMessage()]
    assert said and said[0].levelname == "WARNING"
    assert "set the clock" in said[0].getMessage()
    words = "ahead" if off > 0 else "behind"
    assert f"this device is {words} of the coordinator" in said[0].getMessage()


@OFF
def test_a_bundle_is_not_fetched_and_the_coordinator_is_told_why(
    off: float, device: Any, served: Any, make_bundle: Any, shift: Any
) -> None:
    shift(off)
    found = surveyed(device, served.offer(make_bundle("lora")))
    assert not found.ready
    assert pytest.approx(time.time() + off, abs=60) == found.clock
    assert "clock off by 86" in found.reason, found.reason
    assert "clock off by 86" in device.home.last()["survey"]["refused"]
    assert not Home(device.home.folder).bundles.exists() or not list(
        Home(device.home.folder).bundles.glob("*/graphs")
    )


@OFF
def test_what_is_here_is_trained_to_the_same_bits(
    off: float, device: Any, served: Any, make_bundle: Any, shift: Any
) -> None:
    made = make_bundle("lora")
    job = served.offer(made)
    assert surveyed(device, job).ready
    name = device.membership.device

    def answer(nonce: str) -> bytes:
        plan = Plan(
            job=job, round=1, nonce=nonce, client=name, task="fit", downlink_codec="float32",
            uplink_codec="float32", learning_rate=0.05, local_epochs=1, seed=9,
            max_update_bytes=1_000_000,
        )  # fmt: skip
        blob = pack_plan(plan, codec_named("float32").encode(made.bundle.initial()))
        update = Participant(Home(device.home.folder)).answer(blob)
        return bytes(unpack_update(update, max_bytes=1_000_000)[1])

    before = answer("ab" * 16)
    shift(off)
    assert answer("cd" * 16) == before


@OFF
def test_the_coordinator_takes_nothing_that_was_signed_a_day_away(
    off: float, device: Any, served: Any
) -> None:
    gateway = served.gateway(device, clock=lambda: time.time() + off)
    with pytest.raises(ClockError, match=SAID):
        gateway.check()
    with (
        pytest.raises(ClockError, match="clock off by"),
        gateway.download("ab" * 32, "manifest.json"),
    ):
        pass
    identity = Identity(device.home.folder)
    before = identity.membership
    with pytest.raises(RefusedError, match="clock off by"):
        identity.renew(gateway.renew(identity.renew_request(time.time() + off)))
    assert identity.membership == before, "and the device keeps what it had"


def test_a_coordinator_judges_certificates_by_its_own_clock(device: Any, served: Any) -> None:
    """A device that is behind thinks that an old certificate is good; nobody asks it."""
    authority = served.deployment.authority
    certificate = device.membership.certificate
    later = authority._now
    try:
        authority._now = lambda: time.time() + 8 * DAY
        assert served.deployment.enrolment.devices.check(certificate) is CertificateFault.EXPIRED
        authority._now = lambda: time.time() - DAY
        found = served.deployment.enrolment.devices.check(certificate)
        assert found is CertificateFault.NOT_YET_VALID
    finally:
        authority._now = later
