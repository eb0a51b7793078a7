# SPDX-License-Identifier: Apache-2.0
"""The registry: found by name and key, checked by certificate, shut out at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization

from coordinator.enrolment.authority import Authority, CertificateFault
from coordinator.enrolment.devices import Device, Devices
from coordinator.errors import RegistryError
from protocol.keys import key_fingerprint


def pem(certificate: Any) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def test_device_is_found_by_name_and_by_key(desk: Any, applicant: Any) -> None:
    name = desk.enrolled(applicant).device
    fingerprint = key_fingerprint(applicant.key.public_key())
    devices = desk.service.devices
    device = devices.by_name(name)
    assert isinstance(device, Device)
    assert device.fingerprint == device.node_fingerprint == fingerprint
    assert device.name == f"cam-{fingerprint[:16]}" and device.label == "cam"
    assert device.enrolled == device.seen == desk.clock()
    assert devices.by_fingerprint(fingerprint) == devices.by_node(fingerprint) == device
    assert devices.all() == [device]
    assert devices.by_name("cam") is devices.by_fingerprint("00") is devices.by_node("") is None


def test_members_certificate_is_taken(desk: Any, applicant: Any) -> None:
    answer = desk.enrolled(applicant)
    device = desk.service.devices.check(answer.certificate)
    assert isinstance(device, Device) and device.name == answer.device
    assert desk.service.devices.check(answer.certificate.encode()) == device


def test_bad_certificates_are_refused(
    desk: Any, tmp_path: Path, new_applicant: Callable[[], Any]
) -> None:
    first, second = new_applicant(), new_applicant()
    answer, other = desk.enrolled(first), desk.enrolled(second)
    check = desk.service.devices.check
    key = first.key.public_key()
    # another authority of the same name, for the right name and key
    stranger = Authority.create(tmp_path / "other", "hospital", now=desk.clock)
    assert check(pem(stranger.device(answer.device, key))) is CertificateFault.OTHER_AUTHORITY
    # our authority's signature, for a name that has another key, or that nobody has
    assert check(pem(desk.authority.device(other.device, key))) is CertificateFault.WRONG_NAME
    assert check(pem(desk.authority.device("cam-9", key))) is CertificateFault.UNKNOWN
    desk.service.revoke(other.device)
    assert check(other.certificate) is CertificateFault.REVOKED
    assert isinstance(check(answer.certificate), Device)
    desk.clock += 7 * 86_400
    assert check(answer.certificate) is CertificateFault.EXPIRED


def test_revocation_is_seen_at_once_by_every_process(desk: Any, applicant: Any) -> None:
    answer = desk.enrolled(applicant)
    gateway = desk.open()
    assert isinstance(gateway.devices.check(answer.certificate), Device)
    assert desk.service.revoke(answer.device)
    assert gateway.devices.check(answer.certificate) is CertificateFault.REVOKED
    device = gateway.devices.by_name(answer.device)
    assert device is not None and device.revoked == desk.clock()
    gateway._store.close()
    desk.clock += 5
    assert not desk.service.revoke(answer.device)
    assert desk.service.devices.by_name(answer.device).revoked == desk.clock() - 5
    with pytest.raises(RegistryError, match="expected the name of an enrolled device"):
        desk.service.revoke("nobody")


def test_keys_and_names_belong_to_one_device(desk: Any, applicant: Any) -> None:
    name = desk.enrolled(applicant).device
    devices: Devices = desk.service.devices
    device = devices.by_name(name)
    assert device is not None
    for changes in (
        {"name": "b", "fingerprint": "b"},
        {"name": "b", "node_fingerprint": "b"},
        {"fingerprint": "b", "node_fingerprint": "b"},
    ):
        assert not devices.add(replace(device, **changes))
    assert devices.all() == [device]


def test_what_devices_do_is_counted_in_batches(desk: Any, applicant: Any) -> None:
    name = desk.enrolled(applicant).device
    devices: Devices = desk.service.devices

    def stored() -> Device:
        found = devices.by_name(name)
        assert found is not None
        return found

    began = desk.clock()
    desk.clock += 1
    devices.note(name, bytes_up=10, capabilities={"battery": 0.5})
    devices.note("nobody", bytes_up=10)
    assert stored().bytes_up == 0 and stored().seen == began
    desk.clock += 5
    devices.note(name, bytes_up=5, bytes_down=7, rounds=1, versions={"fedloom": "0.2"})
    device = stored()
    assert (device.bytes_up, device.bytes_down, device.rounds) == (15, 7, 1)
    assert device.seen == began + 6
    assert device.versions == {"fedloom": "0.2"} and device.capabilities == {"battery": 0.5}
    devices.note(name, bytes_up=1)
    (listed,) = devices.all()
    assert listed.bytes_up == 16 and listed == stored()
    desk.clock += -3_600  # a clock that is set back takes nothing back
    devices.note(name)
    devices.flush()
    assert stored().seen == began + 6
