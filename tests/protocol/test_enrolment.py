# SPDX-License-Identifier: Apache-2.0
"""Enrolment messages: strict, bounded, one spelling each."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import _json
from protocol.enrolment import (
    Enrolled,
    EnrolmentMessage,
    EnrolRequest,
    Refusal,
    RefusalCode,
    RenewRequest,
    answer_text,
    pack_enrolment,
    renewal_text,
    unpack_enrol_request,
    unpack_enrolment_answer,
    unpack_renew_request,
)
from protocol.errors import ContainerError, MalformedError, TooLongError, VersionError


def pem(label: str) -> str:
    return f"-----BEGIN {label}-----\nAAAA\n-----END {label}-----\n"


CSR, CERTIFICATE, PUBLIC = pem("CERTIFICATE REQUEST"), pem("CERTIFICATE"), pem("PUBLIC KEY")
ENROL = EnrolRequest(
    token="ab" * 32,
    csr=CSR,
    versions={"fedloom": "0.1.0"},
    capabilities={"threads": 4, "memory_gib": 7.5, "engine": "onnxruntime"},
)
RENEW = RenewRequest(certificate=CERTIFICATE, csr=CSR, time=1_000, signature="ab" * 100)
ENROLLED = Enrolled(
    device="cam-0011223344556677",
    certificate=CERTIFICATE,
    authority=CERTIFICATE,
    coordinator="hospital",
    signing_key="cd" * 32,
    not_after=604_800,
    signature="ab" * 100,
)
REFUSAL = Refusal(code=RefusalCode.TOKEN, reason="no such token")
READERS = {
    "enrol": unpack_enrol_request,
    "renew": unpack_renew_request,
    "enrolled": unpack_enrolment_answer,
    "refused": unpack_enrolment_answer,
}
MESSAGES = [ENROL, replace(ENROL, node_key=PUBLIC, node_proof="ab"), RENEW, ENROLLED, REFUSAL]


def changed(message: EnrolmentMessage, **fields: Any) -> bytes:
    """The message with other fields; None takes one away."""
    value = _json.parse(pack_enrolment(message))
    assert isinstance(value, dict)
    return _json.canonical({k: v for k, v in (value | fields).items() if v is not None})


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.kind)
def test_messages_come_back(message: EnrolmentMessage) -> None:
    raw = pack_enrolment(message)
    assert READERS[message.kind](raw) == message
    assert b'"version":1' in raw


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.kind)
def test_message_of_another_kind_is_refused(message: EnrolmentMessage) -> None:
    others = {reader for kind, reader in READERS.items() if reader is not READERS[message.kind]}
    for reader in others:
        with pytest.raises(MalformedError, match="kind: expected one of"):
            reader(pack_enrolment(message))


@pytest.mark.parametrize(("message", "fields", "words"), [
    (ENROL, {"token": "ab"}, "token: expected 64 hex digits"),
    (ENROL, {"token": "AB" * 32}, "token: expected lower-case hex"),
    (ENROL, {"token": None}, "key 'token' is missing"),
    (ENROL, {"more": 1}, "unknown key 'more'"),
    (ENROL, {"csr": CERTIFICATE}, "csr: expected one PEM block of CERTIFICATE REQUEST"),
    (ENROL, {"csr": CSR + CSR}, "csr: expected one PEM block"),
    (ENROL, {"csr": "x" + CSR}, "csr: expected one PEM block"),
    (ENROL, {"csr": CSR.replace("AAAA", "A" * 9_000)}, "csr: expected at most 8192 characters"),
    (ENROL, {"csr": "é"}, "csr: expected PEM"),
    (ENROL, {"csr": 3}, "csr: expected PEM"),
    (ENROL, {"node_key": PUBLIC}, "node_proof: expected 2 to 208 hex digits"),
    (ENROL, {"node_proof": "ab"}, "node_key: expected one PEM block"),
    (ENROL, {"versions": {"a": 1}}, r"versions\.a: expected text"),
    (ENROL, {"versions": {"a": "x" * 65}}, r"versions\.a: expected 1 to 64 characters"),
    (ENROL, {"versions": {"a\n": "x"}}, "versions: expected printable"),
    (ENROL, {"capabilities": []}, "capabilities: expected an object"),
    (ENROL, {"capabilities": {"a": {}}}, r"capabilities\.a: expected an integer, found a dict"),
    (ENROL, {"capabilities": {"a": True}}, r"capabilities\.a: expected an integer"),
    (ENROL, {"capabilities": {"a": 2**60}}, r"capabilities\.a: expected -9007"),
    (ENROL, {"capabilities": {str(n): n for n in range(65)}}, "at most 64 entries, found 65"),
    (RENEW, {"time": -1}, "time: expected 0 to"),
    (RENEW, {"time": 1.5}, "time: expected an integer"),
    (RENEW, {"signature": ""}, "signature: expected 2 to 208"),
    (RENEW, {"signature": "ab" * 105}, "signature: expected 2 to 208"),
    (ENROLLED, {"signing_key": "ab"}, "signing_key: expected 64 hex digits"),
    (ENROLLED, {"device": "a\x1b[31m"}, "device: expected printable"),
    (ENROLLED, {"not_after": 10**15}, "not_after: expected 0 to"),
    (REFUSAL, {"code": "E999"}, "code: expected one of E301"),
    (REFUSAL, {"reason": 3}, "reason: expected text"),
    (REFUSAL, {"reason": "a\x1b[31m"}, "expected canonical JSON"),
])  # fmt: skip
def test_other_fields_are_refused(
    message: EnrolmentMessage, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(MalformedError, match=words):
        READERS[message.kind](changed(message, **fields))


@pytest.mark.parametrize("version", [0, 2, True, "1", 1.5, [], None])
def test_other_version_is_said_so(version: object) -> None:
    with pytest.raises(VersionError, match="expected version 1, found"):
        unpack_enrol_request(changed(ENROL, version=version))


@pytest.mark.parametrize(("raw", "words"), [
    (b"", "message: Expecting value"),
    (b"[]", "message: expected an object"),
    (b"[" * 60_000, "nested too deeply"),
    (b'{"a":1,"a":1}', "a key is given twice"),
    (b'{"a":NaN}', "found NaN"),
    (b"\xff", "ASCII"),
    (b"1" * 6_000, "message: "),
    (pack_enrolment(ENROL).replace(b",", b", ", 1), "expected canonical JSON"),
])  # fmt: skip
def test_other_bytes_are_refused(raw: bytes, words: str) -> None:
    with pytest.raises(MalformedError, match=words):
        unpack_enrol_request(raw)


def test_long_message_is_refused_before_it_is_read() -> None:
    for reader in READERS.values():
        with pytest.raises(TooLongError, match="at most 65536 bytes, found 65537"):
            reader(b" " * 65_537)
    # 64 names and texts of 64 characters that JSON spells with twelve each
    wide = {f"{n:02}" + "\U0001f512" * 62: "\U0001f512" * 64 for n in range(64)}
    with pytest.raises(TooLongError, match="at most 65536 bytes"):
        pack_enrolment(replace(ENROL, capabilities=wide))


def test_refusal_shows_nothing_that_steers_a_terminal() -> None:
    refusal = Refusal(code=RefusalCode.MALFORMED, reason="a\x1b[31m" + "b" * 2_000)
    assert refusal.reason.startswith("a\N{REPLACEMENT CHARACTER}[31mbb")
    assert len(refusal.reason) == 1_000
    assert str(refusal).endswith("(E301)")
    assert unpack_enrolment_answer(pack_enrolment(refusal)) == refusal


def test_facts_are_copied() -> None:
    versions = {"fedloom": "0.1.0"}
    request = replace(ENROL, versions=versions)
    versions["fedloom"] = "\n"
    assert request.versions == {"fedloom": "0.1.0"}


def test_what_is_signed_differs_with_every_field_and_between_messages() -> None:
    renewals = {
        renewal_text(certificate=a, csr=b, time=c)
        for a in (CERTIFICATE, "x")
        for b in (CSR, "x")
        for c in (1, 2)
    }
    assert len(renewals) == 8
    others = [{"device": "a"}, {"certificate": pem("CERTIFICATE").replace("AA", "BB")},
              {"authority": pem("CERTIFICATE").replace("AA", "BB")}, {"coordinator": "a"},
              {"signing_key": "00" * 32}, {"not_after": 1}]  # fmt: skip
    answers = {answer_text(replace(ENROLLED, **fields)) for fields in others}
    assert len(answers | {answer_text(ENROLLED)}) == 7
    assert answer_text(replace(ENROLLED, signature="")) == answer_text(ENROLLED)


@given(raw=st.binary(max_size=300))
def test_any_bytes_are_an_error(raw: bytes) -> None:
    for reader in READERS.values():
        with pytest.raises(ContainerError):
            reader(raw)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=4,
)


@given(data=st.data())
def test_any_field_is_read_or_refused(data: st.DataObject) -> None:
    message = data.draw(st.sampled_from(MESSAGES))
    value = _json.parse(pack_enrolment(message))
    assert isinstance(value, dict)
    value[data.draw(st.sampled_from(sorted(value)))] = data.draw(VALUES)
    try:
        raw = _json.canonical(value)
    except ValueError:  # an infinity
        return
    try:
        found = READERS[message.kind](raw)
    except ContainerError:
        return
    assert pack_enrolment(found) == raw


def test_page_explains_every_code() -> None:
    page = Path(__file__).parents[2] / "docs" / "refusals.md"
    codes = re.findall(r"^\| (E\d+) ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert codes == [str(code) for code in RefusalCode]
