# SPDX-License-Identifier: Apache-2.0
"""The mistakes that show on a device's side, from its folder and what the coordinator answers."""

from __future__ import annotations

import os
import socket
import ssl
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fedloom.doctor.check import Check, State
from fedloom.doctor.files import check_disk, check_files, flower_fault, flower_version
from fedloom.doctor.mistakes import Side, fail, warn, well

if TYPE_CHECKING:
    from client_sdk.gateway import Address
    from client_sdk.home import Home
    from client_sdk.identity import Identity, Membership
    from client_sdk.settings import Settings

_SIDE: Final[Side] = "device"
_OFF_S: Final = 3.0  # the coordinator refuses requests from more than five seconds ahead
_SOON_S: Final = 86_400
_TIMEOUT_S: Final = 10.0
# Of OpenSSL: the certificate names another host, or another IP address.
_OTHER_NAME: Final = (62, 64)
_ENROL: Final = "ask the operator for a token, and: fedloom device enroll --dir {folder}"


def examine_device(folder: Path) -> list[Check]:
    """Mistakes 1 to 12 but those of the coordinator's own, as far as the folder can be read."""
    from client_sdk.errors import ClientError
    from client_sdk.home import Home
    from client_sdk.identity import Identity

    folder = folder.expanduser().absolute()
    enrol = _ENROL.format(folder=folder)
    if not folder.is_dir():
        return [fail(_SIDE, 1, f"{folder}: expected a device's folder, found none", enrol)]
    private = [folder / name for name in ("key.pem", "node_key", "membership.json")]
    files = check_files(_SIDE, folder, private)
    checks = [files, check_disk(_SIDE, folder)]
    if files.state is State.FAIL:
        # Nothing of it should be used, nor mended by another account.
        return [warn(_SIDE, 1, f"{folder} was not looked into", "mend mistake 2 first"), *checks]
    home = Home(folder)
    try:
        identity = Identity(folder)
        held = identity.membership
        if held is None:
            begun = (
                "enrolment was begun and not finished"
                if identity.key_path.exists()
                else "no member"
            )
            return [fail(_SIDE, 1, f"{folder}: {begun}", enrol), *checks]
        where = home.coordinator()
        settings = home.settings()
    except ClientError as error:
        return [fail(_SIDE, 1, str(error), enrol), *checks]
    return [
        well(_SIDE, 1, f"{held.device}, a member of {held.coordinator}"),
        *checks,
        _versions(),
        _running(home),
        *_coordinator(identity, held, where, enrol),
        _certificate(identity, held, home, enrol),
        _data(home, held, settings),
        _conditions(settings),
    ]


def _versions() -> Check:
    """Mistake 4: Flower outside its bounds."""
    version = flower_version()
    if fault := flower_fault(version):
        return fail(_SIDE, 4, fault, "pip install -c constraints.txt 'fedloom[device]'")
    return well(_SIDE, 4, f"flwr {version}")


def _running(home: Home) -> Check:
    """Mistake 5: nothing runs the device."""
    pid = home.runner()
    if pid is None:
        start = f"fedloom device run --dir {home.folder}"
        return warn(_SIDE, 5, "no process runs this device", start)
    return well(_SIDE, 5, f"process {pid} runs it")


def _coordinator(identity: Identity, held: Membership, where: Address, enrol: str) -> list[Check]:
    """Mistakes 6, 7, 8 and 10: what the coordinator's port says, as far as it gets."""
    from client_sdk.errors import ClientError, ClockError, DeniedError
    from client_sdk.gateway import Gateway

    found: list[Check] = []
    try:
        _handshake(where, held.authority)
    except ssl.SSLCertVerificationError as error:
        found.append(well(_SIDE, 6, f"{where} answers"))
        if error.verify_code in _OTHER_NAME:
            mend = (
                "on the coordinator, add this address to addresses in deployment.toml and start it "
                "again; or enrol this device again under an address that is there"
            )
            return [*found, fail(_SIDE, 7, f"{where}: {error.verify_message}", mend)]
    except OSError as error:
        mend = "see that the coordinator is up, its port open, and this machine's network too"
        return [fail(_SIDE, 6, f"{where}: no answer ({error})", mend)]
    else:
        found.append(well(_SIDE, 6, f"{where} answers"))
        found.append(well(_SIDE, 7, f"its certificate names {where.host}"))
    ahead = 0.0
    denied = ""
    try:
        ahead = Gateway(where, held.authority, identity.key()).check()
    except ClockError as error:
        mend = "set the clock, or switch on what keeps it: timedatectl set-ntp true"
        return [*found, fail(_SIDE, 8, str(error), mend)]
    except DeniedError as error:
        denied = str(error)
    except ClientError as error:
        # An authority that is not the pinned one, or a gateway that fails.
        mend = (
            "ask the operator whether the coordinator was made anew; if so, leave and enrol again"
        )
        return [*found, fail(_SIDE, 10, str(error), mend)]
    if denied:
        return [*found, fail(_SIDE, 10, denied, f"fedloom device leave, then {enrol}")]
    if abs(ahead) > _OFF_S:
        mend = "set the clock, or switch on what keeps it: timedatectl set-ntp true"
        found.append(warn(_SIDE, 8, f"the clock is off by {ahead:.0f} s", mend))
    else:
        found.append(well(_SIDE, 8, "the clock is the coordinator's, to a few seconds"))
    return [*found, well(_SIDE, 10, "the coordinator lets this device in")]


def _handshake(where: Address, authority: str) -> None:
    """Raises: SSLCertVerificationError, OSError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=authority)
    with (
        socket.create_connection((where.host, where.port), timeout=_TIMEOUT_S) as plain,
        context.wrap_socket(plain, server_hostname=where.host),
    ):
        pass


def _certificate(identity: Identity, held: Membership, home: Home, enrol: str) -> Check:
    """Mistake 9: the device's certificate has run out, as after a week without a run."""
    now = time.time()
    end = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(held.not_after))
    if now >= held.not_after:
        found = f"ended {end}: the device did not run for a week, and it can only be renewed before"
        return fail(_SIDE, 9, found, enrol)
    if held.not_after - now < _SOON_S or (identity.renewal_due(now) and home.runner() is None):
        found = f"ends {end} and is not renewed, which a device that runs does by itself"
        return warn(_SIDE, 9, found, f"fedloom device run --dir {home.folder}")
    return well(_SIDE, 9, f"valid until {end}")


def _data(home: Home, held: Membership, settings: Settings | None) -> Check:
    """Mistake 11: the data cannot be opened, or do not fit the job asked for last."""
    from client_sdk.status import status_of

    name = f"fedloom device run --dir {home.folder} --data SOURCE"
    if settings is None:
        return fail(_SIDE, 11, "no data were named yet", name)
    told: dict[str, Any] = status_of(home, held)["data"]
    if told["faults"]:
        return fail(_SIDE, 11, "; ".join(told["faults"][:3]), f"mend them, or name others: {name}")
    job = told["checked_for"]
    fits = f"they fit job {job[:12]}" if job else "no job has read them yet"
    return well(_SIDE, 11, f"{told['samples']} samples of {told['source']}; {fits}")


def _conditions(settings: Settings | None) -> Check:
    """Mistake 12: conditions that never hold on this machine."""
    from client_sdk.conditions import look

    if settings is None:
        return well(_SIDE, 12, "none")
    asked = settings.conditions
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    if asked.least_free_memory_mb > memory:
        found = f"memory: {asked.least_free_memory_mb} MiB free are asked for, of {memory} MiB"
        return fail(_SIDE, 12, found, "fedloom device run --memory MIB, with less")
    verdict = look(asked)
    if verdict.unknown and asked.unknown == "wait":
        found = (
            f"cannot be known on this machine, so it waits for ever: {'; '.join(verdict.unknown)}"
        )
        return fail(
            _SIDE, 12, found, "take the condition back, or: fedloom device run --unknown work"
        )
    return well(_SIDE, 12, str(verdict))
