# SPDX-License-Identifier: Apache-2.0
"""A device that takes part in jobs, for programs: what `fedloom device` does.

    from client_sdk import Device

    device = Device.enroll(coordinator="https://host:8443", token="...", fingerprint="...")
    device.run(data="~/images")     # until SIGTERM, ctrl-c, or device.stop() on another thread

The device listens nowhere but on loopback; everything else goes out to the coordinator's port. This
process only watches: it loads neither onnxruntime nor Flower, for it stays as long as the device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from client_sdk.conditions import Conditions
from client_sdk.errors import (
    ClientError,
    CoordinatorUnreachableError,
    DeniedError,
    FetchError,
    IdentityError,
    RefusedError,
    SettingsError,
)
from client_sdk.gateway import Gateway
from client_sdk.home import Home
from client_sdk.identity import Identity, Membership
from client_sdk.settings import Settings, absolute_source
from client_sdk.supernode import SuperNode
from protocol.enrolment import RefusalCode
from protocol.files import result_of
from protocol.node_headers import MAX_AGE_S, MAX_AHEAD_S

DEFAULT_FOLDER: Final = Path("~/.local/share/fedloom/device")

_JOB: Final = re.compile(r"[0-9a-f]{64}")
_TICK_S: Final = 0.5
_FIRST_PAUSE_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 60.0
_HEALTHY_S: Final = 60.0  # a SuperNode that lived so long begins with the first pause again
_RENEW_AGAIN_S: Final = 600.0
_CLOCK_S: Final = 3.0  # more than that is worth a word before it is too much

_log = logging.getLogger(__name__)


class Device:
    """A device in its folder. One process at a time may run it."""

    def __init__(self, folder: Path | str = DEFAULT_FOLDER) -> None:
        """Raises: IdentityError for a membership that cannot be read."""
        self.home = Home(Path(folder).expanduser())
        self._identity = Identity(self.home.folder)
        self._stop = threading.Event()

    @classmethod
    def enroll(
        cls,
        *,
        coordinator: str,
        token: str,
        fingerprint: str,
        folder: Path | str = DEFAULT_FOLDER,
    ) -> Device:
        """Makes this machine a member; the operator tells all three. Raises: as
        `client_sdk.enrolment.enroll`."""
        from client_sdk.enrolment import enroll

        enroll(Path(folder).expanduser(), coordinator, token, fingerprint)
        return cls(folder)

    @property
    def membership(self) -> Membership | None:
        """None before the device enrolled."""
        return self._identity.membership

    def configure(
        self,
        *,
        data: Path | str | None = None,
        held_out: float | None = None,
        tokenizer: Path | str | None = None,
        bundles_mb: int | None = None,
        outbox_mb: int | None = None,
        conditions: Conditions | None = None,
    ) -> Settings:
        """Remember what is given, on top of what was given before; see `Settings`.

        Raises: SettingsError, also where no data were ever given; IdentityError for no member.
        """
        self._held()
        before = self.home.settings()
        given: dict[str, Any] = {
            "data": None if data is None else _existing_source(str(data)),
            "held_out": held_out,
            "tokenizer": None if tokenizer is None else absolute_source(str(tokenizer)),
            "bundles_mb": bundles_mb,
            "outbox_mb": outbox_mb,
            "conditions": conditions,
        }
        given = {name: value for name, value in given.items() if value is not None}
        if before is None and "data" not in given:
            raise SettingsError(
                "data: expected where this device's data are, found nothing; say so once, with "
                "--data or Device.run(data=...)"
            )
        settings = dataclasses.replace(before, **given) if before else Settings(**given)
        if settings != before:
            self.home.set_settings(settings)
        return settings

    def run(
        self,
        data: Path | str | None = None,
        *,
        held_out: float | None = None,
        tokenizer: Path | str | None = None,
        conditions: Conditions | None = None,
    ) -> None:
        """Take part in jobs until SIGTERM, SIGINT or `stop`; the settings as of `configure`.

        A coordinator that cannot be reached, and a clock that is off, are waited for.

        Raises: DeniedError when the coordinator does not let this device in (any more);
            SettingsError, IdentityError; RunningError where another process runs it.
        """
        self.configure(data=data, held_out=held_out, tokenizer=tokenizer, conditions=conditions)
        address, held = self.home.coordinator(), self._held()
        gateway = Gateway(address, held.authority, self._identity.key())
        supernode = SuperNode(self.home, self._identity, address)
        with self.home.running(), _stopped_by_signals(self.stop):
            _log.info("device %s takes part in the jobs of %s", held.device, address)
            try:
                _Run(self._identity, gateway, supernode, self._stop).go_on()
            finally:
                supernode.stop()

    def stop(self) -> None:
        """Ends `run` soon, and any later one; from a signal handler or another thread."""
        self._stop.set()

    def status(self) -> dict[str, Any]:
        """What there is to know of this device, from its folder; see `client_sdk.status`."""
        from client_sdk.status import status_of

        return status_of(self.home, self._held())

    def fetch_result(self, job: str = "") -> Path:
        """The folder of a bundle that predicts with what a finished job trained.

        Args:
            job: the job's hash, 64 hex digits; "": the job that this device was asked about last.

        Raises: FetchError where the job is not finished, or its network is split; DeniedError,
            CoordinatorUnreachableError; SettingsError where no job is known.
        """
        from client_sdk.bundle_cache import DEFAULT_BYTES, BundleCache

        held, settings, last = self._held(), self.home.settings(), self.home.last()
        asked = last.get("work") or last.get("survey") or {}
        job = job or str(asked.get("job", ""))
        if not _JOB.fullmatch(job):
            raise SettingsError(
                "job: expected its hash, 64 hex digits, as the operator's `status --json` says it; "
                f"found {job[:80]!r}"
            )
        gateway = Gateway(self.home.coordinator(), held.authority, self._identity.key())
        most = settings.bundle_bytes if settings else DEFAULT_BYTES
        cache = BundleCache(self.home.bundles, max_bytes=most)
        try:
            return cache.get(result_of(job), held.signing_key, gateway.download).folder
        except FetchError as error:
            raise FetchError(f"the result of job {job[:12]}, if it is finished: {error}") from error

    def leave(self) -> None:
        """Remove all that was made in the folder. Raises: RunningError, IdentityError."""
        self.home.leave()

    def _held(self) -> Membership:
        if self._identity.membership is None:
            raise IdentityError(
                f"{self.home.folder}: no member of any deployment; enrol with: "
                "fedloom device enroll"
            )
        return self._identity.membership


class _Run:
    """One run of a device: its SuperNode is up, and its certificate valid."""

    def __init__(
        self,
        identity: Identity,
        gateway: Gateway,
        supernode: SuperNode,
        stop: threading.Event,
    ) -> None:
        self._identity = identity
        self._gateway = gateway
        self._supernode = supernode
        self._stop = stop
        self._renew_at = 0.0
        self._pause_s = _FIRST_PAUSE_S

    def go_on(self) -> None:
        """Until `stop`. Raises: DeniedError, RunningError."""
        while not self._stop.is_set():
            try:
                ahead = self._gateway.check()
            except CoordinatorUnreachableError as error:
                self._wait(str(error))
                continue
            if abs(ahead) > _CLOCK_S:
                _log.warning(
                    "clock off by %.0f s: this device is %s of the coordinator, which refuses one "
                    "that is %.0f s ahead or %.0f s behind; set the clock",
                    abs(ahead), "ahead" if ahead > 0 else "behind", MAX_AHEAD_S, MAX_AGE_S,
                )  # fmt: skip
            self._supernode.start()
            begun = time.monotonic()
            ended = self._watch()
            self._supernode.stop()
            if time.monotonic() - begun >= _HEALTHY_S:
                self._pause_s = _FIRST_PAUSE_S
            if not self._stop.is_set():
                self._wait(f"SuperNode ended ({ended})")

    def _watch(self) -> str:
        """How SuperNode ended; "" where it has to be stopped."""
        while not self._stop.wait(_TICK_S):
            if ended := self._supernode.ended():
                return ended
            if time.monotonic() >= self._renew_at and self._identity.renewal_due(time.time()):
                self._renew()
        return ""

    def _renew(self) -> None:
        """A new certificate over the same key, so that SuperNode may go on. Raises: DeniedError."""
        try:
            held = self._identity.renew(
                self._gateway.renew(self._identity.renew_request(time.time()))
            )
        except RefusedError as error:
            if error.code is RefusalCode.REVOKED:
                raise DeniedError(f"{error}; leave with: fedloom device leave") from None
            _log.error("the certificate cannot be renewed: %s", error)
        except ClientError as error:
            _log.warning("the certificate is not renewed yet: %s", error)
        else:
            _log.info("the certificate was renewed, valid until %s", _utc(held.not_after))
        self._renew_at = time.monotonic() + _RENEW_AGAIN_S

    def _wait(self, reason: str) -> None:
        # Shorter by chance, so that the devices of a site do not all come back at once.
        pause = self._pause_s * random.uniform(0.5, 1.0)
        self._pause_s = min(_LONGEST_PAUSE_S, self._pause_s * 2)
        _log.warning("%s; trying again in %.0f s", reason, pause)
        self._stop.wait(pause)


@contextlib.contextmanager
def _stopped_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Outside the main thread signals are the program's own affair."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, lambda *_: stop()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _existing_source(address: str) -> str:
    """Raises: SettingsError. What lies there is looked at when a job asks for it."""
    made = absolute_source(address)
    if ":" not in made and made and not Path(made).exists():
        raise SettingsError(f"data: {made}: no such file or folder")
    return made


def _utc(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(seconds))
