# SPDX-License-Identifier: Apache-2.0
"""A device's folder: its key stays, its coordinator is pinned, a crash leaves the old or the new.

The answers come from the coordinator's own desk, so that both sides are tried together.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client_sdk.errors import ClientError, IdentityChangedError, IdentityError, RefusedError
from client_sdk.identity import Identity, leave_folder, plain_fingerprint, require_authority
from coordinator.enrolment.authority import Authority, CertificateFault
from coordinator.enrolment.service import Enrolment
from coordinator.enrolment.store import Store
from protocol.enrolment import (
    Enrolled,
    RefusalCode,
    answer_text,
    pack_enrolment,
    unpack_enrol_request,
    unpack_enrolment_answer,
)
from protocol.keys import load_key, new_key

SIGNING_KEY = "cd" * 32
DAY_S = 86_400
NAMES = {".identity", "key.pem", "node_key", "certificate.pem", "authority.pem", "membership.json"}


@dataclass
class Clock:
    now: float = 2_000_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Coordinator:
    authority: Authority
    service: Enrolment
    clock: Clock

    def answer(self, identity: Identity, token: str = "") -> bytes:
        request = identity.enrol_request(token or self.service.create_token("cam"))
        return self.service.enrol(request)

    def signed(self, answer: Enrolled, **fields: Any) -> bytes:
        """The answer with other fields, signed as if they were meant."""
        changed = replace(answer, **fields)
        signature = self.authority.sign(answer_text(changed)).hex()
        return pack_enrolment(replace(changed, signature=signature))


def opened(folder: Path, clock: Clock, signing_key: str = SIGNING_KEY) -> Coordinator:
    authority = Authority.create(folder, "hospital", now=clock)
    store = Store(folder / "registry.sqlite")
    service = Enrolment(
        authority, store, coordinator="hospital", signing_key=signing_key, now=clock
    )
    return Coordinator(authority, service, clock)


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    made = opened(tmp_path / "coordinator", Clock())
    yield made
    made.service._store.close()


@pytest.fixture
def other(tmp_path: Path, coordinator: Coordinator) -> Iterator[Coordinator]:
    """Another deployment that calls itself the same."""
    made = opened(tmp_path / "other", coordinator.clock)
    yield made
    made.service._store.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "device"


@pytest.fixture
def member(folder: Path, coordinator: Coordinator) -> Identity:
    identity = Identity(folder)
    identity.join(coordinator.answer(identity), fingerprint=coordinator.authority.fingerprint)
    return identity


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def enrolled(raw: bytes) -> Enrolled:
    answer = unpack_enrolment_answer(raw)
    assert isinstance(answer, Enrolled)
    return answer


def test_device_enrols_and_pins_its_coordinator(folder: Path, coordinator: Coordinator) -> None:
    identity = Identity(folder)
    assert identity.membership is None and not folder.exists()
    raw = coordinator.answer(identity)
    joined = identity.join(raw, fingerprint=coordinator.authority.fingerprint)
    assert joined == identity.membership == Identity(folder).membership
    assert joined.device == enrolled(raw).device and joined.coordinator == "hospital"
    assert joined.signing_key == SIGNING_KEY
    assert joined.fingerprint == coordinator.authority.fingerprint
    assert joined.not_after - joined.not_before == 7 * DAY_S
    assert identity.certificate_path.read_text() == joined.certificate
    assert identity.authority_path.read_text() == coordinator.authority.pem
    assert {path.name for path in folder.iterdir()} == NAMES


@pytest.fixture
def careless_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("careless_umask")
def test_key_stays_on_the_device_and_is_its_owners_alone(
    folder: Path, coordinator: Coordinator
) -> None:
    identity = Identity(folder)
    request = identity.enrol_request(coordinator.service.create_token("cam"))
    answer = coordinator.service.enrol(request)
    identity.join(answer, fingerprint=coordinator.authority.fingerprint)
    renewal = identity.renew_request(coordinator.clock())
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    public = {"certificate.pem", "authority.pem"}
    assert modes == {name: 0o644 if name in public else 0o600 for name in NAMES}
    assert folder.stat().st_mode & 0o777 == 0o700
    secret = load_key(identity.key_path).private_numbers().private_value.to_bytes(48, "big")
    lines = identity.key_path.read_bytes().splitlines()[1:-1]
    for sent in (request, renewal):
        assert secret not in sent and secret.hex().encode() not in sent
        assert not any(line in sent for line in lines)


def test_key_is_made_once(folder: Path, coordinator: Coordinator) -> None:
    identity = Identity(folder)
    key = identity.key().public_key()
    csrs = [
        x509.load_pem_x509_csr(unpack_enrol_request(made.enrol_request("ab" * 32)).csr.encode())
        for made in (identity, Identity(folder))
    ]
    assert all(csr.public_key() == key and csr.is_signature_valid for csr in csrs)
    flower = serialization.load_ssh_private_key
    identity.join(coordinator.answer(identity), fingerprint=coordinator.authority.fingerprint)
    assert flower(identity.node_key_path.read_bytes(), None).public_key() == key


def test_readable_key_is_refused(member: Identity) -> None:
    member.key_path.chmod(0o644)
    with pytest.raises(IdentityError, match="expected mode 600, found 644"):
        member.renew_request(0)


def test_lost_key_is_said_so_and_none_is_made_in_its_place(member: Identity) -> None:
    member.key_path.unlink()
    with pytest.raises(IdentityError, match="it is gone; leave and enrol again"):
        member.renew_request(0)
    assert not member.key_path.exists()


def test_request_says_what_the_device_is(folder: Path) -> None:
    raw = Identity(folder).enrol_request(
        " " + "ab" * 32 + "\n", versions={"fedloom": "0.1"}, capabilities={"threads": 4}
    )
    request = unpack_enrol_request(raw)
    assert request.token == "ab" * 32 and request.node_key == ""
    assert (request.versions, request.capabilities) == ({"fedloom": "0.1"}, {"threads": 4})
    with pytest.raises(IdentityError, match="token: expected 64 hex digits"):
        Identity(folder).enrol_request("ab")


@pytest.mark.parametrize("spelling", [
    lambda text: text.upper(),
    lambda text: ":".join(text[i : i + 2] for i in range(0, 64, 2)).upper(),
    lambda text: f" {text}\n",
])  # fmt: skip
def test_fingerprint_is_taken_as_people_give_it(
    folder: Path, coordinator: Coordinator, spelling: Callable[[str], str]
) -> None:
    identity = Identity(folder)
    fingerprint = spelling(coordinator.authority.fingerprint)
    assert identity.join(coordinator.answer(identity), fingerprint=fingerprint)
    require_authority(coordinator.authority.pem, fingerprint)


@pytest.mark.parametrize("text", ["", "ab", "zz" * 32, "ab" * 33])
def test_other_fingerprints_are_refused_before_anything_else(text: str) -> None:
    with pytest.raises(IdentityError, match="fingerprint: expected the SHA-256"):
        plain_fingerprint(text)


def test_authority_with_another_fingerprint_is_refused(
    folder: Path, coordinator: Coordinator, other: Coordinator
) -> None:
    identity = Identity(folder)
    with pytest.raises(IdentityChangedError, match="somebody may stand in between"):
        identity.join(other.answer(identity), fingerprint=coordinator.authority.fingerprint)
    assert identity.membership is None and {p.name for p in folder.iterdir()} == {
        ".identity", "key.pem"
    }  # fmt: skip
    with pytest.raises(IdentityError, match="expected a certificate in PEM"):
        require_authority("", coordinator.authority.fingerprint)


def test_refusal_is_an_error_with_its_code(folder: Path, coordinator: Coordinator) -> None:
    identity = Identity(folder)
    with pytest.raises(RefusedError, match=r"refused: token: .*\(E304\)") as caught:
        identity.join(
            coordinator.answer(identity, "00" * 32), fingerprint=coordinator.authority.fingerprint
        )
    assert caught.value.code is RefusalCode.TOKEN


def test_answers_that_are_not_for_this_device_are_refused(
    folder: Path, tmp_path: Path, coordinator: Coordinator, other: Coordinator
) -> None:
    identity, stranger = Identity(folder), Identity(tmp_path / "stranger")
    fingerprint = coordinator.authority.fingerprint
    good = enrolled(coordinator.answer(identity))
    theirs = coordinator.answer(stranger)
    before = contents(folder)
    foreign = enrolled(other.answer(identity))
    for raw, words in (
        (theirs, "over another"),
        (b"", "answer: message: "),
        (pack_enrolment(replace(good, signature="")), "does not belong"),
        (pack_enrolment(replace(good, signing_key="ef" * 32)), "does not belong"),
        (pack_enrolment(replace(good, coordinator="clinic")), "does not belong"),
        (coordinator.signed(good, device="cam-2"), "for another name"),
        (coordinator.signed(good, certificate=foreign.certificate), "signed by the coordinator"),
        (coordinator.signed(good, certificate=good.authority), "over another"),
    ):
        with pytest.raises(IdentityError, match=words):
            identity.join(raw, fingerprint=fingerprint)
        assert contents(folder) == before and identity.membership is None
    assert identity.join(pack_enrolment(good), fingerprint=fingerprint)


def test_renewal_is_due_at_two_thirds_of_the_life(
    member: Identity, coordinator: Coordinator
) -> None:
    held = member.membership
    assert held is not None
    due = held.not_before + 7 * DAY_S * 2 / 3
    assert not member.renewal_due(coordinator.clock())
    assert not member.renewal_due(due - 1) and member.renewal_due(due)
    assert member.renewal_due(held.not_after + DAY_S)


def test_certificate_is_renewed(folder: Path, member: Identity, coordinator: Coordinator) -> None:
    first = member.membership
    assert first is not None
    coordinator.clock.now += 5 * DAY_S
    raw = coordinator.service.renew(member.renew_request(coordinator.clock()))
    renewed = member.renew(raw)
    assert renewed.not_after == first.not_after + 5 * DAY_S
    assert renewed.device == first.device and not member.renewal_due(coordinator.clock())
    assert Identity(folder).membership == renewed
    assert member.certificate_path.read_text() == renewed.certificate != first.certificate
    # an older answer, sent again
    with pytest.raises(IdentityError, match="ends later than the one held"):
        member.renew(coordinator.signed(enrolled(raw), certificate=first.certificate))
    assert Identity(folder).membership == renewed


def test_device_whose_clock_is_off_is_told_so(member: Identity, coordinator: Coordinator) -> None:
    for off in (DAY_S, -DAY_S):
        raw = coordinator.service.renew(member.renew_request(coordinator.clock() + off))
        with pytest.raises(RefusedError, match=rf"clock off by \{off:+} seconds") as caught:
            member.renew(raw)
        assert caught.value.code is RefusalCode.CLOCK


def test_changed_coordinator_is_reported_and_nothing_is_accepted(
    folder: Path, member: Identity, coordinator: Coordinator, other: Coordinator
) -> None:
    held, before = member.membership, contents(folder)
    assert held is not None
    foreign, theirs = other.answer(member), other.authority.fingerprint
    good = enrolled(coordinator.service.renew(member.renew_request(coordinator.clock())))
    for raw, words in (
        (foreign, f"authority changed: {held.fingerprint} is pinned, found {theirs}"),
        (coordinator.signed(good, signing_key="ef" * 32), f"signing key changed: {SIGNING_KEY}"),
        (coordinator.signed(good, coordinator="clinic"), "name changed: hospital"),
    ):
        with pytest.raises(IdentityChangedError, match=words):
            member.renew(raw)
    with pytest.raises(IdentityChangedError, match="authority changed"):
        member.join(foreign, fingerprint=other.authority.fingerprint)
    with pytest.raises(IdentityError, match=f"expected it for '{held.device}'"):
        member.renew(coordinator.signed(good, device="cam-2"))
    assert contents(folder) == before and Identity(folder).membership == held
    assert member.renew(pack_enrolment(good)).device == held.device


def test_nothing_can_be_renewed_before_the_device_enrolled(folder: Path) -> None:
    identity = Identity(folder)
    for ask in (lambda: identity.renew(b""), lambda: identity.renew_request(0)):
        with pytest.raises(IdentityError, match="enrol this device first"):
            ask()
    with pytest.raises(IdentityError, match="enrol this device first"):
        identity.renewal_due(0)


@pytest.mark.parametrize("count", range(1, 5))
def test_crash_leaves_the_old_membership_or_the_new_one(
    folder: Path,
    member: Identity,
    coordinator: Coordinator,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
) -> None:
    """The process dies at its `count`th rename, or right after it: files stay as they are."""
    old = member.membership
    assert old is not None
    coordinator.clock.now += DAY_S
    raw = coordinator.service.renew(member.renew_request(coordinator.clock()))
    real, calls = os.replace, 0

    class DiedError(BaseException):
        pass

    def dying(source: Any, target: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == (count + 1) // 2:
            if count % 2 == 0:
                real(source, target)
            raise DiedError
        real(source, target)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(DiedError):
        member.renew(raw)
    monkeypatch.undo()
    after = Identity(folder)
    held = after.membership
    assert held is not None
    expected = old.certificate if count == 1 else enrolled(raw).certificate
    assert held.certificate == expected == after.certificate_path.read_text()
    assert after.renew(raw).certificate == enrolled(raw).certificate


def test_full_disk_is_an_error_and_changes_nothing(
    folder: Path, member: Identity, coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(folder)
    coordinator.clock.now += DAY_S
    raw = coordinator.service.renew(member.renew_request(coordinator.clock()))

    def full(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(IdentityError, match=r"cannot be written .*no space left"):
        member.renew(raw)
    with pytest.raises(IdentityError, match=r"cannot be written .*no space left"):
        Identity(folder.parent / "second").key()
    assert contents(folder) == before
    monkeypatch.undo()
    assert member.renew(raw).certificate == enrolled(raw).certificate


def test_spoilt_membership_is_said_so_and_can_be_left(folder: Path, member: Identity) -> None:
    path = folder / "membership.json"
    for content in (b"", path.read_bytes()[:-3], b'{"code":"E301","kind":"refused"}'):
        path.write_bytes(content)
        with pytest.raises(IdentityError, match=r"membership\.json.*leave and enrol again"):
            Identity(folder)
    leave_folder(folder)
    assert not folder.exists()


def test_leaving_removes_what_was_made(
    folder: Path, member: Identity, coordinator: Coordinator
) -> None:
    (folder / ".membership.json.0123abcd.partial").write_bytes(b"of a crash")
    member.leave()
    assert member.membership is None and not folder.exists()
    member.leave()
    # and the device may enrol again, with another key
    member.join(coordinator.answer(member), fingerprint=coordinator.authority.fingerprint)
    assert len(coordinator.service.devices.all()) == 2


def test_leaving_removes_nothing_of_others(folder: Path, coordinator: Coordinator) -> None:
    folder.mkdir()
    (folder / "photos").mkdir()
    identity = Identity(folder)
    identity.join(coordinator.answer(identity), fingerprint=coordinator.authority.fingerprint)
    (folder / "notes").write_text("mine")
    identity.leave()
    assert sorted(path.name for path in folder.iterdir()) == ["notes", "photos"]
    for path in list(folder.iterdir()):
        path.rmdir() if path.is_dir() else path.unlink()
    identity.key()
    identity.leave()
    assert folder.exists()  # it was there before


def test_files_that_were_there_before_are_left_alone(folder: Path) -> None:
    folder.mkdir()
    (folder / "certificate.pem").write_text("mine")
    with pytest.raises(IdentityError, match=r"certificate\.pem: expected no such file"):
        Identity(folder).key()
    leave_folder(folder)
    assert contents(folder) == {"certificate.pem": b"mine"}


def of_no_version(pem: str) -> str:
    """A certificate, or a request for one, that says it is of a version there is none of."""
    begin, *lines, end = pem.strip().splitlines()
    der = bytearray(base64.b64decode("".join(lines)))
    # [0] EXPLICIT, and in requests plain: INTEGER of one byte, the first after the outer sequences.
    place = der.index(b"\x02\x01") + 2
    der[place] = 7
    return "\n".join([begin, base64.b64encode(der).decode(), end]) + "\n"


def test_certificates_of_no_version_are_refused(member: Identity, coordinator: Coordinator) -> None:
    raw = coordinator.service.renew(member.renew_request(coordinator.clock()))
    for field in ("certificate", "authority"):
        spoilt = coordinator.signed(
            enrolled(raw), **{field: of_no_version(getattr(enrolled(raw), field))}
        )
        with pytest.raises(IdentityError):
            member.renew(spoilt)
    with pytest.raises(IdentityError, match="expected a certificate in PEM"):
        require_authority(of_no_version(coordinator.authority.pem), "0" * 64)


def test_requests_of_no_version_are_refused_by_the_coordinator(
    folder: Path, coordinator: Coordinator
) -> None:
    asked = unpack_enrol_request(
        Identity(folder).enrol_request(coordinator.service.create_token("cam"))
    )
    spoilt = pack_enrolment(replace(asked, csr=of_no_version(asked.csr)))
    with pytest.raises(RefusedError, match="csr: expected a PKCS#10 request"):
        Identity(folder).join(
            coordinator.service.enrol(spoilt), fingerprint=coordinator.authority.fingerprint
        )
    found = coordinator.authority.check(of_no_version(coordinator.authority.pem))
    assert found is CertificateFault.MALFORMED


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(data=st.data())
def test_any_answer_is_taken_whole_or_refused(
    folder: Path, member: Identity, coordinator: Coordinator, data: st.DataObject
) -> None:
    held, before = member.membership, contents(folder)
    raw = bytearray((folder / "membership.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    for answer in (bytes(raw), data.draw(st.binary(max_size=100))):
        if answer == before["membership.json"]:
            continue
        with pytest.raises(ClientError):
            member.renew(answer)
        with pytest.raises(ClientError):
            member.join(answer, fingerprint=coordinator.authority.fingerprint)
    assert contents(folder) == before and member.membership == held


def test_second_process_finds_the_first_ones_key(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Identity(folder).key()
    exists = Path.exists

    def late(path: Path, **options: Any) -> bool:
        return path.name != "key.pem" and exists(path, **options)

    monkeypatch.setattr(Path, "exists", late)  # it looked before the first had written
    assert Identity(folder).key().public_key() == first.public_key() != new_key().public_key()
