# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.errors import SecureMessageError, SecureSumError
from aggregation.secure_aggregation.context import Context, Task, Terms, new_context
from aggregation.secure_aggregation.messages import (
    HEADER_BYTES,
    SEALED_BYTES,
    Advertisement,
    Announcement,
    Consent,
    Evidence,
    MaskedInput,
    PeerKey,
    PeerKeys,
    PeerShares,
    Reveal,
    SealedShares,
    Survivors,
    decode,
    encode,
    masked_input_bytes,
)
from aggregation.secure_aggregation.shamir import PRIME

TASK = Task(job=bytes(32), round=7, nonce=bytes(16), plan=bytes(32), values=40, bits=12)
CONTEXT = Context(
    task=TASK,
    names=("Zoë", "a", "b"),
    degree=2,
    threshold=2,
    min_survivors=3,
    seed=bytes(range(32)),
)

HASHES = st.binary(min_size=32, max_size=32)
SIGNATURES = st.binary(max_size=512)
PLACES = st.lists(st.integers(0, 65_535), max_size=6, unique=True).map(sorted)
SEALED = PLACES.flatmap(
    lambda places: st.tuples(
        *(
            st.tuples(st.just(p), st.binary(min_size=SEALED_BYTES, max_size=SEALED_BYTES))
            for p in places
        )
    )
)
SHARES = PLACES.flatmap(
    lambda places: st.tuples(*(st.tuples(st.just(p), st.integers(0, PRIME - 1)) for p in places))
)
MEMBERS = PLACES.map(tuple)
ADVERTS = st.builds(
    Advertisement, attempt=HASHES, sealing_key=HASHES, mask_key=HASHES, signature=SIGNATURES
)
MESSAGES = st.one_of(
    ADVERTS,
    st.builds(
        PeerKeys,
        attempt=HASHES,
        keys=PLACES.flatmap(
            lambda places: st.tuples(
                *(st.builds(PeerKey, peer=st.just(p), advertisement=ADVERTS) for p in places)
            )
        ),
    ),
    st.builds(SealedShares, attempt=HASHES, commitment=HASHES, sealed=SEALED),
    st.builds(PeerShares, attempt=HASHES, sealed=SEALED),
    st.builds(MaskedInput, attempt=HASHES, payload=st.binary(max_size=50)),
    st.builds(Survivors, attempt=HASHES, members=MEMBERS),
    st.builds(Consent, attempt=HASHES, signature=SIGNATURES),
    st.builds(
        Evidence,
        attempt=HASHES,
        members=MEMBERS,
        signatures=PLACES.flatmap(
            lambda places: st.tuples(*(st.tuples(st.just(p), SIGNATURES) for p in places))
        ),
    ),
    st.builds(Reveal, attempt=HASHES, seeds=SHARES, mask_keys=SHARES),
    st.just(Announcement(context=CONTEXT)),
)


@given(MESSAGES)
def test_messages_come_back_as_they_were(message):
    assert decode(encode(message)) == message


@given(MESSAGES, st.data())
def test_no_other_bytes_mean_the_same(message, data):
    """What is cut, longer or changed is refused, or is another message with those bytes."""
    blob = encode(message)
    cut = data.draw(st.integers(0, len(blob) - 1))
    with pytest.raises(SecureMessageError):
        decode(blob[:cut])
    with pytest.raises(SecureMessageError):
        decode(blob + b"\0")
    at, bit = data.draw(st.integers(0, len(blob) - 1)), data.draw(st.integers(0, 7))
    changed = bytearray(blob)
    changed[at] ^= 1 << bit
    try:
        other = decode(bytes(changed))
    except SecureMessageError:
        return
    assert encode(other) == bytes(changed)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused(blob):
    for start in (b"", b"FLSA\x01", encode(Consent(attempt=bytes(32), signature=b""))[:-2]):
        try:
            found = decode(start + blob)
        except SecureMessageError:
            continue
        assert encode(found) == start + blob


def test_a_consent_has_these_bytes():
    assert encode(Consent(attempt=bytes(range(32)), signature=b"abc")) == (
        b"FLSA\x01\x07" + bytes(range(32)) + b"\x03\x00abc"
    )
    assert encode(Survivors(attempt=bytes(32), members=(0, 258))) == (
        b"FLSA\x01\x06" + bytes(32) + b"\x02\0\0\0" + b"\0\0\0\0" + b"\x02\x01\0\0"
    )


def test_the_digest_is_of_these_bytes():
    raw = b"".join(
        (
            bytes(32), struct.pack("<I", 7), struct.pack("<H", 16) + bytes(16), bytes(32),
            struct.pack("<QB", 40, 12), struct.pack("<III", 2, 2, 3), bytes(range(32)),
            struct.pack("<I", 3), b"\x04\0Zo\xc3\xab", b"\x01\0a", b"\x01\0b",
        )
    )  # fmt: skip
    assert CONTEXT.to_bytes() == raw
    assert CONTEXT.digest() == hashlib.sha256(b"fedloom secure sum\0" + raw).digest()


def test_a_masked_input_is_read_without_a_copy():
    blob = encode(MaskedInput(attempt=bytes(32), payload=b"x" * 100))
    assert len(blob) == masked_input_bytes(100)
    message = decode(blob)
    assert isinstance(message, MaskedInput) and isinstance(message.payload, memoryview)
    assert message.payload.obj is blob


@pytest.mark.parametrize(
    ("blob", "words"),
    [
        (b"FLUP" + bytes(60), "expected it to start"),
        (b"FLSA\x02\x00" + bytes(60), "expected version 1, found 2"),
        (b"FLSA\x01\x0a" + bytes(60), "kind below 10, found 10"),
        (b"FLSA\x01\x06" + bytes(32) + struct.pack("<I", 1 << 31), "are said to follow"),
        (b"FLSA\x01\x06" + bytes(32) + struct.pack("<III", 2, 5, 5), "ascending order"),
        (b"FLSA\x01\x06" + bytes(32) + struct.pack("<II", 1, 1 << 16), "ascending order"),
        (b"FLSA\x01\x05" + bytes(32) + struct.pack("<Q", 1 << 62), "bytes more"),
        (b"FLSA\x01\x07" + bytes(32) + struct.pack("<H", 513) + bytes(513), "at most 512"),
        (
            b"FLSA\x01\x09" + bytes(32) + struct.pack("<II", 1, 0) + b"\xff" * 33 + bytes(4),
            "below the prime",
        ),
    ],
)
def test_bytes_that_are_no_message_are_refused_in_words(blob, words):
    with pytest.raises(SecureMessageError, match=words):
        decode(blob)


def test_messages_beyond_the_limit_are_not_looked_at():
    with pytest.raises(SecureMessageError, match="at most 10 bytes, found 40"):
        decode(bytes(40), max_bytes=10)


def test_an_announcement_with_another_digest_is_refused():
    blob = bytearray(encode(Announcement(context=CONTEXT)))
    blob[HEADER_BYTES - 1] ^= 1
    with pytest.raises(SecureMessageError, match="digest is not that of its context"):
        decode(bytes(blob))


@pytest.mark.parametrize(
    "changes",
    [
        {"round": 8},
        {"job": bytes([1]) * 32},
        {"nonce": bytes(17)},
        {"plan": bytes([1]) * 32},
        {"values": 41},
        {"bits": 13},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_part_of_a_task_is_in_the_digest(changes):
    assert replace(CONTEXT, task=replace(TASK, **changes)).digest() != CONTEXT.digest()


@pytest.mark.parametrize(
    "changes",
    [
        {"names": ("a", "b", "c")},
        {"degree": 1, "threshold": 1},
        {"threshold": 1},
        {"min_survivors": 2},
        {"seed": bytes(32)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_part_of_a_context_is_in_the_digest(changes):
    assert replace(CONTEXT, **changes).digest() != CONTEXT.digest()


@pytest.mark.parametrize(
    "changes",
    [
        {"names": ("a", "b")},
        {"names": ("a", "c", "b")},
        {"names": ("a", "a", "b")},
        {"names": ("", "a", "b")},
        {"names": ("a", "b", "c" * 129)},
        {"names": ("a", "b", "c\n")},
        {"degree": 3},
        {"degree": 0},
        {"threshold": 3},
        {"threshold": 0},
        {"min_survivors": 4},
        {"seed": bytes(31)},
    ],
)
def test_contexts_that_cannot_be_are_refused(changes):
    with pytest.raises(SecureMessageError):
        replace(CONTEXT, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"job": bytes(31)},
        {"round": -1},
        {"round": True},
        {"nonce": bytes(7)},
        {"nonce": bytes(33)},
        {"plan": bytes(33)},
        {"values": 0},
        {"bits": 0},
        {"bits": 33},
    ],
)
def test_tasks_that_cannot_be_are_refused(changes):
    with pytest.raises(SecureMessageError):
        replace(TASK, **changes)


@pytest.mark.parametrize(
    "settings", [{"corrupt": 1.0}, {"dropouts": -0.1}, {"min_survivors": 1}, {"corrupt": "0.1"}]
)
def test_terms_that_cannot_be_are_refused(settings):
    with pytest.raises(SecureSumError):
        Terms(**settings)


def test_new_contexts_sort_their_names_and_refuse_what_cannot_be_met():
    made = new_context(TASK, ["c", "a", "b"], Terms())
    assert made.names == ("a", "b", "c") and (made.degree, made.threshold) == (2, 2)
    assert made.seed != new_context(TASK, ["c", "a", "b"], Terms()).seed
    with pytest.raises(SecureSumError, match="4 are asked for and only 3"):
        new_context(TASK, "abc", Terms(min_survivors=4))
    with pytest.raises(SecureSumError, match="allow for fewer dropouts"):
        new_context(TASK, "abc", Terms(dropouts=0.34))
