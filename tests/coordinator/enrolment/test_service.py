# SPDX-License-Identifier: Apache-2.0
"""The desk: who is let in, who is not, and that no race, crash or message gets around it."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.enrolment.authority import Authority
from coordinator.enrolment.devices import Devices
from coordinator.enrolment.service import Enrolment
from coordinator.enrolment.store import Store
from coordinator.errors import AuthorityError, RegistryError
from protocol.enrolment import (
    Enrolled,
    Refusal,
    RefusalCode,
    answer_text,
    node_text,
    unpack_enrolment_answer,
)
from protocol.keys import key_fingerprint, load_public, new_key, public_pem, sign, verify

ROOT = Path(__file__).parents[3]
UNKNOWN_TOKEN = "00" * 32


def pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def audited(desk: Any) -> list[tuple[str, str]]:
    assert desk.service.audit.verify() is None
    return [(entry.event, entry.subject) for entry in desk.service.audit.entries()]


def reason(desk: Any) -> str:
    *_, last = desk.service.audit.entries()
    assert last.event == "refused"
    return f"{last.detail['code']} {last.detail['reason']}"


def test_device_gets_a_certificate_over_its_key_and_what_it_pins(desk: Any, applicant: Any) -> None:
    token = desk.service.create_token("cam")
    raw = desk.service.enrol(
        applicant.enrol(token, versions={"fedloom": "0.1"}, capabilities={"threads": 4}),
        caller="10.0.0.1",
    )
    answer = unpack_enrolment_answer(raw)
    assert isinstance(answer, Enrolled)
    certificate = x509.load_pem_x509_certificate(answer.certificate.encode())
    assert certificate.public_key() == applicant.key.public_key()
    assert answer.not_after == certificate.not_valid_after_utc.timestamp()
    assert (answer.coordinator, answer.signing_key) == ("hospital", "cd" * 32)
    assert answer.authority == desk.authority.pem
    authority = desk.authority.certificate.public_key()
    verify(answer_text(answer), bytes.fromhex(answer.signature), authority)
    device = desk.service.devices.by_name(answer.device)
    assert device.versions == {"fedloom": "0.1"} and device.capabilities == {"threads": 4}
    assert audited(desk) == [("token", "cam"), ("enrolled", answer.device)]
    *_, entry = desk.service.audit.entries()
    assert entry.detail["caller"] == "10.0.0.1" and entry.detail["key"] == device.fingerprint
    assert token not in str(list(desk.service.audit.entries()))


def test_token_faults_are_one_to_the_caller_and_several_in_the_log(
    desk: Any, new_applicant: Callable[[], Any]
) -> None:
    used = desk.service.create_token("cam")
    expired = desk.service.create_token("cam", lifetime_s=60)
    desk.service.enrol(new_applicant().enrol(used))
    desk.clock += 60
    answers, reasons = set(), []
    for token in (used, expired, UNKNOWN_TOKEN):
        answers.add(desk.service.enrol(new_applicant().enrol(token)))
        reasons.append(reason(desk).rsplit(" ", 1)[0])
    assert len(answers) == 1
    assert reasons == ["E304 used-up token", "E304 expired token", "E304 unknown token"]
    assert len(desk.service.devices.all()) == 1


def test_device_that_got_no_answer_is_given_the_same_certificate_again(
    desk: Any, applicant: Any, new_applicant: Callable[[], Any], refusal: Any
) -> None:
    token = desk.service.create_token("cam")
    first = unpack_enrolment_answer(desk.service.enrol(applicant.enrol(token)))
    desk.clock += 3_601  # the token has expired: it is not needed any more
    again = unpack_enrolment_answer(desk.service.enrol(applicant.enrol(token)))
    assert isinstance(first, Enrolled) and isinstance(again, Enrolled)
    assert again.certificate == first.certificate
    assert desk.service.tokens.all()[0].used == 1
    assert refusal(desk.service.enrol(new_applicant().enrol(token))).code is RefusalCode.TOKEN
    desk.service.revoke(first.device)
    assert refusal(desk.service.enrol(applicant.enrol(token))).code is RefusalCode.REVOKED


def test_member_whose_certificate_ended_enrols_again_under_its_name(
    desk: Any, applicant: Any, refusal: Any
) -> None:
    first = desk.enrolled(applicant)
    desk.service.devices.note(first.device, rounds=3)
    desk.service.devices.flush()
    desk.clock += 8 * 86_400
    token = desk.service.create_token("other")
    raw = applicant.enrol(token)
    again = unpack_enrolment_answer(desk.service.enrol(raw))
    assert isinstance(again, Enrolled)
    assert again.device == first.device and again.not_after > first.not_after
    (device,) = desk.service.devices.all()
    assert device.certificate == again.certificate and device.rounds == 3
    repeated = unpack_enrolment_answer(desk.service.enrol(raw))
    assert isinstance(repeated, Enrolled) and repeated.certificate == again.certificate


def test_revoked_device_is_kept_out_and_spends_no_token(
    desk: Any, applicant: Any, refusal: Any
) -> None:
    answer = desk.enrolled(applicant)
    desk.service.revoke(answer.device, why="lost\x1b")
    token = desk.service.create_token("cam")
    assert refusal(desk.service.enrol(applicant.enrol(token))).code is RefusalCode.REVOKED
    assert desk.service.tokens.all()[-1].used == 0
    renewal = applicant.renew(answer.certificate, desk.clock())
    assert refusal(desk.service.renew(renewal)).code is RefusalCode.REVOKED
    assert ("revoked", answer.device) in audited(desk)
    revoked = next(e for e in desk.service.audit.entries() if e.event == "revoked")
    assert revoked.detail == {"why": "lost\N{REPLACEMENT CHARACTER}"}


@pytest.mark.parametrize(("key", "words"), [
    (ec.generate_private_key(ec.SECP256R1()), "csr: expected a P-384 key"),
    (rsa.generate_private_key(65537, 2048), "csr: expected a P-384 key"),
], ids=["P-256", "RSA"])  # fmt: skip
def test_other_kinds_of_keys_are_refused(
    desk: Any, applicant: Any, make_csr: Callable[[Any], str], refusal: Any, key: Any, words: str
) -> None:
    request = type(applicant)(applicant.key, make_csr(key)).enrol(desk.service.create_token("cam"))
    found = refusal(desk.service.enrol(request))
    assert found.code is RefusalCode.KEY and words in found.reason
    assert desk.service.tokens.all()[0].used == 0


def test_csr_without_proof_of_possession_is_refused(
    desk: Any, applicant: Any, new_applicant: Callable[[], Any], refusal: Any
) -> None:
    """A CSR over somebody else's key, and one that was changed."""
    token = desk.service.create_token("cam")
    csr = x509.load_pem_x509_csr(applicant.csr.encode())
    raw = csr.public_bytes(serialization.Encoding.DER)
    own, other = (
        key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
        for key in (csr.public_key(), new_applicant().key.public_key())
    )
    for changed in (raw.replace(own, other), raw.replace(b"whatever", b"whoever1")):
        assert changed != raw
        text = x509.load_der_x509_csr(changed).public_bytes(serialization.Encoding.PEM).decode()
        found = refusal(desk.service.enrol(type(applicant)(applicant.key, text).enrol(token)))
        assert found.code is RefusalCode.KEY
        assert found.reason == "csr: its signature is not by its own key"
    empty = "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"
    found = refusal(desk.service.enrol(type(applicant)(applicant.key, empty).enrol(token)))
    assert found.code is RefusalCode.KEY and "expected a PKCS#10 request" in found.reason
    assert desk.service.devices.all() == [] and desk.service.tokens.all()[0].used == 0


def test_node_key_of_its_own_needs_a_proof_and_belongs_to_one_device(
    desk: Any, applicant: Any, new_applicant: Callable[[], Any], refusal: Any
) -> None:
    node = new_key()
    fields = {"node_key": public_pem(node.public_key())}
    proof = sign(node_text(applicant.csr), node).hex()
    for wrong in (sign(b"other", node).hex(), sign(node_text(applicant.csr), new_key()).hex()):
        request = applicant.enrol(desk.service.create_token("cam"), **fields, node_proof=wrong)
        found = refusal(desk.service.enrol(request))
        assert found.code is RefusalCode.KEY and found.reason.startswith("node key: ")
    request = applicant.enrol(desk.service.create_token("cam"), **fields, node_proof=proof)
    assert isinstance(unpack_enrolment_answer(desk.service.enrol(request)), Enrolled)
    device = desk.service.devices.by_node(key_fingerprint(node.public_key()))
    assert device is not None and load_public(device.node_key) == node.public_key()
    assert device.fingerprint == key_fingerprint(applicant.key.public_key())

    other = new_applicant()
    proof = sign(node_text(other.csr), node).hex()
    request = other.enrol(desk.service.create_token("cam"), **fields, node_proof=proof)
    found = refusal(desk.service.enrol(request))
    assert found.code is RefusalCode.KEY and "another device has this node key" in found.reason
    assert desk.service.tokens.all()[-1].used == 0


def test_member_renews_its_certificate(desk: Any, applicant: Any) -> None:
    first = desk.enrolled(applicant)
    desk.clock += 5 * 86_400
    raw = desk.service.renew(applicant.renew(first.certificate, desk.clock()), caller="10.0.0.1")
    answer = unpack_enrolment_answer(raw)
    assert isinstance(answer, Enrolled)
    assert answer.device == first.device
    assert answer.not_after == first.not_after + 5 * 86_400
    device = desk.service.devices.check(answer.certificate)
    assert device.certificate == answer.certificate and device.seen == desk.clock()
    assert desk.service.devices.check(first.certificate).name == first.device
    assert audited(desk)[-1] == ("renewed", first.device)


def test_renewals_that_are_not_a_members_own_are_refused(
    desk: Any, tmp_path: Path, new_applicant: Callable[[], Any], refusal: Any
) -> None:
    applicant, thief = new_applicant(), new_applicant()
    first, second = desk.enrolled(applicant), desk.enrolled(thief)
    stranger = Authority.create(tmp_path / "other", "hospital", now=desk.clock)
    key = applicant.key.public_key()

    def code(raw: bytes) -> RefusalCode:
        return refusal(desk.service.renew(raw)).code

    now = desk.clock()
    # somebody has a copy of the certificate, not its key
    assert code(thief.renew(first.certificate, now)) is RefusalCode.KEY
    assert code(thief.renew(first.certificate, now, csr=applicant.csr)) is RefusalCode.SIGNATURE
    # a key of its own, and a certificate that is not a member's
    foreign = pem(stranger.device(first.device, key))
    assert code(applicant.renew(foreign, now)) is RefusalCode.CERTIFICATE
    wrong_name = pem(desk.authority.device(second.device, key))
    assert code(applicant.renew(wrong_name, now)) is RefusalCode.CERTIFICATE
    assert code(applicant.renew(desk.authority.pem, now)) is RefusalCode.CERTIFICATE
    desk.clock += 8 * 86_400
    assert code(applicant.renew(first.certificate, desk.clock())) is RefusalCode.CERTIFICATE
    assert "it has expired" in reason(desk)
    assert {event for event, _ in audited(desk)} == {"token", "enrolled", "refused"}


def test_signed_fields_of_a_renewal_cannot_be_changed(
    desk: Any, applicant: Any, refusal: Any
) -> None:
    first = desk.enrolled(applicant)
    raw = applicant.renew(first.certificate, desk.clock())
    changed = raw.replace(b'"time":2000000000', b'"time":2000000001')
    assert changed != raw
    assert refusal(desk.service.renew(changed)).code is RefusalCode.SIGNATURE


@pytest.mark.parametrize(("off", "words"), [
    (86_400, r"clock off by \+86400 seconds"), (-86_400, "clock off by -86400 seconds"),
])  # fmt: skip
def test_device_is_told_how_far_its_clock_is_off(
    desk: Any, applicant: Any, refusal: Any, off: int, words: str
) -> None:
    first = desk.enrolled(applicant)
    found = refusal(desk.service.renew(applicant.renew(first.certificate, desk.clock() + off)))
    assert found.code is RefusalCode.CLOCK
    assert words.replace("\\", "") in found.reason
    near = applicant.renew(first.certificate, desk.clock() + off / 25)
    assert isinstance(unpack_enrolment_answer(desk.service.renew(near)), Enrolled)


def test_hundred_threads_with_one_token_get_one_certificate(
    desk: Any, new_applicant: Callable[[], Any]
) -> None:
    token = desk.service.create_token("cam")
    requests = [new_applicant().enrol(token) for _ in range(100)]
    answers = raced(desk.service, requests)
    granted = [answer for answer in answers if isinstance(answer, Enrolled)]
    refused = {answer.code for answer in answers if isinstance(answer, Refusal)}
    assert len(granted) == 1 and refused == {RefusalCode.TOKEN}
    (device,) = desk.service.devices.all()
    assert device.certificate == granted[0].certificate
    events = [event for event, _ in audited(desk)]
    assert events.count("enrolled") == 1 and events.count("refused") == 99


def test_ten_tokens_and_thousand_enrolments_give_ten_certificates(
    desk: Any, new_applicant: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    applicants = [new_applicant() for _ in range(100)]
    tokens = [desk.service.create_token("cam") for _ in range(10)]
    # A hundred keys try each token; one that has won may win again with another token.
    requests = [applicant.enrol(token) for token in tokens for applicant in applicants]
    signed: list[str] = []
    device = Authority.device

    def counting(self: Authority, name: str, *arguments: Any, **named: Any) -> Any:
        signed.append(name)
        return device(self, name, *arguments, **named)

    monkeypatch.setattr(Authority, "device", counting)
    answers = raced(desk.service, requests, threads=20)
    assert len(signed) == 10
    certificates = {a.certificate for a in answers if isinstance(a, Enrolled)}
    assert len(certificates) == 10
    assert sum(token.used for token in desk.service.tokens.all()) == 10
    events = [event for event, _ in audited(desk)]
    assert events.count("enrolled") == 10
    assert events.count("refused") <= 100  # the others are counted, not written


def raced(
    service: Enrolment, requests: list[bytes], *, threads: int = 100
) -> list[Enrolled | Refusal]:
    """The answers to all of them, sent by so many threads at once."""
    answers: list[Enrolled | Refusal] = []
    start = threading.Barrier(threads)

    def send(own: list[bytes]) -> None:
        start.wait()
        for request in own:
            answers.append(unpack_enrolment_answer(service.enrol(request)))

    running = [
        threading.Thread(target=send, args=(requests[number::threads],))
        for number in range(threads)
    ]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert len(answers) == len(requests)
    return answers


KILLED = """
import os, signal, sys
from pathlib import Path
from coordinator.enrolment.authority import Authority
from coordinator.enrolment.devices import Devices
from coordinator.enrolment import service
from coordinator.enrolment.store import Store

folder, point = Path(sys.argv[1]), sys.argv[2]
now = lambda: 2_000_000_000.0

def die(*arguments, **named):
    os.kill(os.getpid(), signal.SIGKILL)

if point == "before the device":
    Devices.add = die
if point == "before the log":
    service.Enrolment._note = die
if point == "after the commit":
    service.pack_enrolment = die
with Store(folder / "registry.sqlite") as store:
    authority = Authority.open(folder, now=now)
    desk = service.Enrolment(
        authority, store, coordinator="hospital", signing_key="cd" * 32, now=now
    )
    desk.enrol((folder / "request").read_bytes())
"""


@pytest.mark.parametrize("point", ["before the device", "before the log", "after the commit"])
def test_killed_process_neither_loses_nor_doubles_a_certificate(
    desk: Any, applicant: Any, new_applicant: Callable[[], Any], refusal: Any, point: str
) -> None:
    token = desk.service.create_token("cam")
    request = applicant.enrol(token)
    (desk.folder / "request").write_bytes(request)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(desk.folder), point], cwd=ROOT, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL
    committed = point == "after the commit"
    assert desk.service.tokens.all()[0].used == committed
    assert len(desk.service.devices.all()) == committed
    answer = unpack_enrolment_answer(desk.service.enrol(request))
    assert isinstance(answer, Enrolled)
    (device,) = desk.service.devices.all()
    assert device.certificate == answer.certificate
    assert desk.service.tokens.all()[0].used == 1
    assert refusal(desk.service.enrol(new_applicant().enrol(token))).code is RefusalCode.TOKEN
    assert [event for event, _ in audited(desk)].count("enrolled") == 1


def test_fault_of_ours_is_an_exception_and_changes_nothing(
    desk: Any, applicant: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = desk.service.create_token("cam")
    (pages,) = desk.store.rows("PRAGMA page_count")[0]
    desk.store.rows(f"PRAGMA max_page_count = {pages}")
    wide = {f"{n}": "x" * 64 for n in range(64)}
    with pytest.raises(RegistryError, match="full"):
        desk.service.enrol(applicant.enrol(token, capabilities=wide))
    desk.store.rows(f"PRAGMA max_page_count = {pages + 1_000}")
    assert desk.service.tokens.all()[0].used == 0
    answer = unpack_enrolment_answer(desk.service.enrol(applicant.enrol(token)))
    assert isinstance(answer, Enrolled)
    assert audited(desk) == [("token", "cam"), ("enrolled", answer.device)]


@pytest.mark.parametrize(("raw", "code"), [
    (b"", RefusalCode.MALFORMED),
    (b"{}", RefusalCode.WRONG_VERSION),
    (b" " * 65_537, RefusalCode.TOO_LONG),
    (b"x" * 10_000_000, RefusalCode.TOO_LONG),
    (b'{"version":2}', RefusalCode.WRONG_VERSION),
    (b'{"kind":"refused","version":1}', RefusalCode.MALFORMED),
    (b'{"kind":"\\u001b[31m","version":1}', RefusalCode.MALFORMED),
], ids=lambda value: str(value)[:12])  # fmt: skip
def test_malformed_and_oversized_messages_are_refused_and_noted(
    desk: Any, refusal: Any, raw: bytes, code: RefusalCode
) -> None:
    for ask in (desk.service.enrol, desk.service.renew):
        found = refusal(ask(raw, caller="a\x1b" * 200))
        assert found.code is code and found.reason.isprintable()
    for entry in desk.service.audit.entries():
        assert entry.event == "refused" and entry.detail["code"] == code
        assert len(str(entry.detail["caller"])) == 100
        assert (
            str(entry.detail["caller"]).isprintable() and str(entry.detail["reason"]).isprintable()
        )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(data=st.data())
def test_any_message_gets_a_refusal(
    hostile_desk: tuple[Enrolment, bytes, bytes], data: st.DataObject
) -> None:
    """Random bytes, and honest messages with a few bytes changed."""
    service, enrol, renew = hostile_desk
    for ask, honest in ((service.enrol, enrol), (service.renew, renew)):
        raw = bytearray(honest)
        for _ in range(data.draw(st.integers(1, 3))):
            position = data.draw(st.integers(0, len(raw) - 1))
            raw[position] ^= data.draw(st.integers(1, 255))
        junk = data.draw(st.binary(max_size=100))
        for message in (bytes(raw), honest[: len(junk)] + junk, junk):
            assert isinstance(unpack_enrolment_answer(ask(message)), Refusal)


@pytest.fixture
def hostile_desk(desk: Any, applicant: Any) -> tuple[Enrolment, bytes, bytes]:
    """A desk that has enrolled nobody, so that no changed message is an honest one."""
    stranger = Authority.create(desk.folder / "other", "hospital", now=desk.clock)
    certificate = stranger.device("cam", applicant.key.public_key())
    renewal = applicant.renew(pem(certificate), desk.clock())
    return desk.service, applicant.enrol(UNKNOWN_TOKEN), renewal


def test_coordinator_has_a_plain_name(desk: Any) -> None:
    with pytest.raises(AuthorityError, match="coordinator: expected 1 to 40 letters"):
        Enrolment(desk.authority, desk.store, coordinator="a b", signing_key="cd" * 32)


def test_settings_of_the_service_are_kept(tmp_path: Path, clock: Any, applicant: Any) -> None:
    authority = Authority.create(tmp_path, "a", now=clock)
    with Store(tmp_path / "r") as store:
        service = Enrolment(
            authority, store, coordinator="a", signing_key="cd" * 32, lifetime_s=3_600, now=clock
        )
        answer = unpack_enrolment_answer(
            service.enrol(applicant.enrol(service.create_token("cam", quota=2)))
        )
        assert isinstance(answer, Enrolled)
        assert answer.not_after == clock() - 300 + 3_600
        assert isinstance(service.devices, Devices)
