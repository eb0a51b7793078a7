# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import ContainerError, MalformedError
from protocol.stream import (
    Close,
    Open,
    Ready,
    Refused,
    States,
    StreamMessage,
    pack_header,
    pack_message,
    unpack_message,
)

OPEN = Open(job="a" * 64, round=3, client="ada", nonce="b" * 16)
MESSAGES = [
    OPEN,
    Ready(answered=7),
    States(kind="forward", number=1, rows=4, keep=False),
    States(kind="left", number=1, rows=4),
    States(kind="backward", number=2, rows=4),
    States(kind="entered", number=2, rows=4),
    Refused(reason="no such job", again=True),
    Close(),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.kind)
def test_messages_come_back(message: StreamMessage) -> None:
    payload = b"states" if isinstance(message, States) else b""
    found, rest = unpack_message(pack_message(message, payload), max_bytes=1000)
    assert found == message
    assert bytes(rest) == payload


@pytest.mark.parametrize("header", [
    {"kind": "shout"},
    {"kind": 3},
    {},
    [],
    {"kind": "close", "number": 1},
    {"kind": "forward", "number": 0, "rows": 1, "keep": True},
    {"kind": "forward", "number": 1, "rows": 1 << 40, "keep": True},
    {"kind": "forward", "number": 1, "rows": 1, "keep": 1},
    {"kind": "open", "job": "a" * 64, "round": 0, "client": "ada"},
    {"kind": "open", "job": "a" * 64, "round": -1, "client": "ada", "nonce": "b" * 16},
    {"kind": "ready", "answered": -1},
], ids=str)  # fmt: skip
def test_other_headers_are_refused(header: object) -> None:
    with pytest.raises(MalformedError):
        unpack_message(pack_header(header), max_bytes=1000)


def test_only_states_have_a_payload() -> None:
    with pytest.raises(MalformedError, match="close: expected no payload, found 1 bytes"):
        unpack_message(pack_header({"kind": "close"}, b"x"), max_bytes=1000)


@pytest.mark.parametrize(("change", "words"), [
    (lambda raw: raw[:9], "expected at least 10 bytes, found 9"),
    (lambda raw: raw[:-1], "bytes or more"),
    (lambda raw: b"FLUP" + raw[4:], "expected it to start b'FLSP'"),
    (lambda raw: raw[:4] + b"\2\0" + raw[6:], "expected version 1, found 2"),
    (lambda raw: raw[:6] + b"\xff" * 4 + raw[10:], "header: expected at most 65536 bytes"),
    (lambda raw: raw + b" " * 200, "message: expected at most 200 bytes"),
    (lambda raw: raw[:6] + b"\x11" + raw[7:18] + b" " + raw[18:], "canonical"),
])  # fmt: skip
def test_what_is_no_message_is_refused_with_what_was_expected(change: object, words: str) -> None:
    raw = change(pack_message(Close()))  # type: ignore[operator]
    with pytest.raises(ContainerError, match=words):
        unpack_message(raw, max_bytes=200)


@given(blob=st.binary(max_size=200))
def test_any_bytes_are_a_message_or_an_error(blob: bytes) -> None:
    with pytest.raises(ContainerError):
        unpack_message(blob, max_bytes=100)


@given(header=st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
))  # fmt: skip
def test_any_header_is_a_message_or_an_error(header: object) -> None:
    try:
        blob = pack_header(header)
    except (ContainerError, UnicodeEncodeError):
        return
    with pytest.raises(ContainerError):
        unpack_message(blob, max_bytes=len(blob))
