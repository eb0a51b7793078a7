# SPDX-License-Identifier: Apache-2.0
"""What the gateway asks of the registry, and how SuperLink comes to know the members."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from client_sdk.identity import Identity
from coordinator import up
from coordinator.deployment import Deployment, Settings
from coordinator.enrolment.devices import Device
from coordinator.errors import RegistryError, SuperLinkError
from coordinator.jobs.registry import Outcome
from coordinator.superlink import Node
from coordinator.up import Registrar, hooks_of
from protocol.enrolment import Refusal, unpack_enrolment_answer
from protocol.files import result_of


class FakeNodes:
    """SuperLink's nodes; fails so often before it works."""

    def __init__(self, *failures: str) -> None:
        self.failures = list(failures)
        self.registered: list[str] = []
        self.others: list[int] = []  # known beside those that are registered here
        self.called = threading.Semaphore(0)

    def register(self, public_key: bytes, *, name: str = "") -> int:
        try:
            if self.failures:
                raise SuperLinkError(self.failures.pop(0))
            assert public_key.startswith(b"-----BEGIN PUBLIC KEY-----")
            self.registered.append(name)
            return len(self.registered)
        finally:
            self.called.release()

    def all(self) -> list[Node]:
        return [Node(number, "registered") for number in self.others]


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    settings = Settings(name="ward", addresses=("localhost",))
    with Deployment.create(tmp_path / "deployment", settings) as made:
        yield made


def registrar(deployment: Deployment, nodes: Any) -> Registrar:
    return Registrar(nodes, deployment.enrolment.devices)


def member(deployment: Deployment, folder: Path, hooks: Any) -> Device:
    token = deployment.enrolment.create_token("bed")
    identity = Identity(folder)
    answer = hooks.enroll(identity.enrol_request(token))
    held = identity.join(answer, fingerprint=deployment.authority.fingerprint)
    device = deployment.enrolment.devices.by_name(held.device)
    assert device is not None
    return device


def test_a_member_is_known_to_superlink_before_it_hears_of_it(
    deployment: Deployment, tmp_path: Path
) -> None:
    nodes = FakeNodes()
    device = member(deployment, tmp_path / "a", hooks_of(deployment, registrar(deployment, nodes)))
    assert nodes.registered == [device.name]


def test_a_refused_enrolment_registers_nobody(deployment: Deployment, tmp_path: Path) -> None:
    nodes = FakeNodes()
    hooks = hooks_of(deployment, registrar(deployment, nodes))
    request = Identity(tmp_path / "a").enrol_request("0" * 64)
    assert isinstance(unpack_enrolment_answer(hooks.enroll(request)), Refusal)
    assert not nodes.registered


def test_members_are_let_in_strangers_and_revoked_ones_are_not(
    deployment: Deployment, tmp_path: Path
) -> None:
    hooks = hooks_of(deployment, registrar(deployment, FakeNodes()))
    device = member(deployment, tmp_path / "a", hooks)
    key = device.node_key.encode()
    assert hooks.refuse(key) == ""
    hooks.seen(key, 300, 20)
    (counted,) = deployment.enrolment.devices.all()
    assert (counted.bytes_up, counted.bytes_down) == (300, 20)
    deployment.enrolment.revoke(device.name)
    assert hooks.refuse(key) == "this device was revoked"
    for stranger in (Identity(tmp_path / "b").key().public_key(), None):
        pem = b"nonsense"
        if stranger is not None:
            from protocol.keys import public_pem

            pem = public_pem(stranger).encode()
        assert "enrol it with a token" in hooks.refuse(pem)
        hooks.seen(pem, 1, 1)  # counts for nobody


def test_bundles_are_found_by_their_hash_alone(deployment: Deployment) -> None:
    hooks = hooks_of(deployment, registrar(deployment, FakeNodes()))
    deployment.jobs.add("wards", "ab" * 32)
    assert hooks.find_bundle("ab" * 32) == deployment.folder / "jobs" / "wards" / "bundle"
    assert hooks.find_bundle("cd" * 32) is None


def test_results_are_found_once_their_job_is_finished(deployment: Deployment) -> None:
    hooks = hooks_of(deployment, registrar(deployment, FakeNodes()))
    deployment.jobs.add("wards", "ab" * 32)
    predict = deployment.jobs_folder / "wards" / "predict"
    predict.mkdir(parents=True)
    assert hooks.find_bundle(result_of("ab" * 32)) is None, "it is not finished"
    deployment.jobs.end("wards", Outcome.FINISHED)
    assert hooks.find_bundle(result_of("ab" * 32)) == predict
    predict.rmdir()
    assert hooks.find_bundle(result_of("ab" * 32)) is None, "a split network has none"


def test_what_superlink_did_not_take_is_told_again(
    deployment: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(up, "_REGISTER_AGAIN_S", 0.01)
    nodes = FakeNodes("it is not running", "nor now")
    registering = registrar(deployment, nodes)
    device = member(deployment, tmp_path / "a", hooks_of(deployment, registering))
    assert not nodes.registered, "the device is a member all the same"
    with registering:
        for _ in range(3):
            assert nodes.called.acquire(timeout=10)
    assert nodes.registered == [device.name]


def test_a_restart_goes_through_all_members_but_the_revoked(
    deployment: Deployment, tmp_path: Path
) -> None:
    hooks = hooks_of(deployment, registrar(deployment, FakeNodes("down", "down", "down")))
    names = [member(deployment, tmp_path / name, hooks).name for name in "abc"]
    deployment.enrolment.revoke(names[1])
    nodes = FakeNodes("flwr supernode register: [code: 23] in use")
    with registrar(deployment, nodes):
        for _ in range(2):
            assert nodes.called.acquire(timeout=10)
    assert nodes.registered == [names[2]], "the first one was known already"


def test_a_registry_that_cannot_be_read_is_read_again(
    deployment: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(up, "_REGISTER_AGAIN_S", 0.01)
    device = member(
        deployment, tmp_path / "a", hooks_of(deployment, registrar(deployment, FakeNodes("down")))
    )
    calls: list[int] = []
    members = deployment.enrolment.devices.all

    def locked_at_first() -> list[Device]:
        calls.append(1)
        if len(calls) == 1:
            raise RegistryError("locked")
        return members()

    monkeypatch.setattr(deployment.enrolment.devices, "all", locked_at_first)
    nodes = FakeNodes()
    with registrar(deployment, nodes):
        assert nodes.called.acquire(timeout=10)
    assert nodes.registered == [device.name] and len(calls) == 2


def test_superlinks_numbers_say_who_is_who(deployment: Deployment, tmp_path: Path) -> None:
    nodes = FakeNodes()
    hooks = hooks_of(deployment, registrar(deployment, nodes))
    names = [member(deployment, tmp_path / name, hooks).name for name in "ab"]
    assert deployment.enrolment.devices.members_by_node() == {1: names[0], 2: names[1]}
    deployment.enrolment.revoke(names[0])
    assert deployment.enrolment.devices.members_by_node() == {2: names[1]}


@pytest.mark.parametrize(("others", "found"), [([1, 77], 77), ([1], None), ([1, 77, 78], None)])
def test_a_number_that_a_crash_kept_from_us_is_the_one_that_nobody_has(
    deployment: Deployment, tmp_path: Path, others: list[int], found: int | None
) -> None:
    nodes = FakeNodes()
    hooks = hooks_of(deployment, registrar(deployment, nodes))
    first = member(deployment, tmp_path / "a", hooks).name
    nodes.failures, nodes.others = ["[code: 23] Public key already in use"], others
    second = member(deployment, tmp_path / "b", hooks)
    known = {1: first} | ({found: second.name} if found else {})
    assert deployment.enrolment.devices.members_by_node() == known


@pytest.mark.parametrize("fault", [OSError("no space left"), RegistryError("disk is full")])
def test_a_full_disk_does_not_end_the_registrar(
    deployment: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    monkeypatch.setattr(up, "_REGISTER_AGAIN_S", 0.01)
    device = member(
        deployment, tmp_path / "a", hooks_of(deployment, registrar(deployment, FakeNodes("down")))
    )
    nodes, devices = FakeNodes(), deployment.enrolment.devices
    where, name = (nodes, "register") if isinstance(fault, OSError) else (devices, "assign_node")
    works, faults = getattr(where, name), [fault]

    def once_full(*arguments: Any, **named: Any) -> Any:
        if faults:
            raise faults.pop()
        return works(*arguments, **named)

    monkeypatch.setattr(where, name, once_full)
    with registrar(deployment, nodes):
        assert nodes.called.acquire(timeout=10)
        assert isinstance(fault, OSError) or nodes.called.acquire(timeout=10)
    assert set(nodes.registered) == {device.name}
