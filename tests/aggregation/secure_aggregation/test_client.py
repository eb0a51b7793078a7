# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.errors import SecureMessageError, SecureSumError
from aggregation.packing import unpack
from aggregation.secure_aggregation import client, keys, server
from aggregation.secure_aggregation.client_bytes import from_bytes, to_bytes
from aggregation.secure_aggregation.context import Terms
from aggregation.secure_aggregation.masks import add_mask, reduce, subtract_mask
from aggregation.secure_aggregation.messages import (
    Announcement,
    Consent,
    MaskedInput,
    PeerKeys,
    PeerShares,
    SealedShares,
    decode,
    encode,
)
from aggregation.secure_aggregation.outcomes import Reason, Refusal
from aggregation.secure_aggregation.server_state import Stage
from simulations.secure_rounds import attempt_with, play

ME = "client-0002"


class Watched:
    """An attempt of five clients in which one client's states and messages are kept."""

    def __init__(self, *, bits: int = 12) -> None:
        self.room, self.context = attempt_with(
            5, values=30, bits=bits, terms=Terms(), rng=np.random.default_rng(0)
        )
        self.device = self.room.devices[ME]
        self.vector = self.room.vectors[ME]
        self.states: list[client.ClientState | None] = [None]
        self.asked: list[bytes] = []
        self.answers: list[bytes] = []
        state, out = server.open_attempt(self.context)
        while True:
            for name, message in out.items():
                if name == ME:
                    before = self.states[-1]
                    after, answer = client.advance(before, message, self.device, self.vector)
                    self.asked.append(message)
                    self.answers.append(answer)
                    self.states.append(after)
                else:
                    answer = self.room.tell(name, message)
                state, fault = server.receive(state, name, answer, self.room.members.verify)
                assert fault is None
            state, result = server.close_stage(state)
            if isinstance(result, server.SecureSum):
                break
            out = result


@pytest.fixture(scope="module")
def watched() -> Watched:
    return Watched()


def test_states_come_one_after_another(watched):
    assert [type(state) for state in watched.states[1:]] == [
        client.Advertised, client.Shared, client.Masked, client.Consented, client.Revealed,
    ]  # fmt: skip


def test_the_masked_vector_is_the_formula_s(watched):
    """y = x + PRG(b) ± PRG(s_uv), each mask from keys that are derived here again."""
    masked, context = watched.states[3], watched.context
    attempt, own = context.digest(), context.names.index(ME)
    total = watched.vector.copy()
    add_mask(total, keys.self_mask_key(masked.seed, attempt=attempt, name=ME))
    assert len(masked.peers) == context.degree
    for peer, public in masked.peers.items():
        agreed = keys.agree(masked.mask_secret, public)
        other = context.names[peer]
        key = keys.pair_mask_key(agreed, attempt=attempt, one=ME, other=other)
        (add_mask if peer > own else subtract_mask)(total, key)
    reduce(total, 12)
    message = decode(watched.answers[2])
    assert isinstance(message, MaskedInput)
    np.testing.assert_array_equal(unpack(message.payload, 30, 12), total)
    assert not np.array_equal(total, watched.vector)


def test_a_message_again_gets_the_same_answer_also_after_a_restart(watched):
    for asked, answer, after in zip(
        watched.asked, watched.answers, watched.states[1:], strict=True
    ):
        kept = from_bytes(to_bytes(after))
        assert kept == after
        state, again = client.advance(kept, asked, watched.device, watched.vector)
        assert again == answer and state == after


def test_messages_of_other_stages_change_nothing(watched):
    for number, state in enumerate(watched.states):
        for at, asked in enumerate(watched.asked):
            if at in (number, number - 1):
                continue
            after, answer = client.advance(state, asked, watched.device, watched.vector)
            assert after == state
            assert isinstance(answer, Refusal) and not answer.final
            assert answer.reason is Reason.OUT_OF_ORDER


def test_messages_of_other_attempts_change_nothing(watched):
    other = Watched()
    for state in watched.states[1:]:
        for asked in other.asked:
            after, answer = client.advance(state, asked, watched.device, watched.vector)
            assert after == state
            assert isinstance(answer, Refusal) and answer.reason is Reason.OTHER_ATTEMPT


def test_answers_of_clients_and_other_bytes_change_nothing(watched):
    for state in watched.states:
        for blob in (b"", b"FLSA", bytes(100), *watched.answers):
            after, answer = client.advance(state, blob, watched.device, watched.vector)
            assert after == state and isinstance(answer, Refusal) and not answer.final


def test_another_vector_under_the_same_masks_is_refused(watched):
    other = watched.vector.copy()
    other[3] ^= 1
    after, answer = client.advance(watched.states[3], watched.asked[2], watched.device, other)
    assert after == watched.states[3]
    assert isinstance(answer, Refusal) and answer.reason is Reason.CHANGED_VALUES


def test_the_vector_is_asked_for_where_it_is_needed(watched):
    needed = [
        (state is not None and number, at)
        for number, state in enumerate(watched.states)
        for at, asked in enumerate(watched.asked)
        if client.wants_values(state, asked)
    ]
    assert needed == [(2, 2), (3, 2)]
    assert not client.wants_values(watched.states[2], b"no message")
    before = watched.vector.copy()
    client.advance(watched.states[2], watched.asked[2], watched.device, watched.vector)
    np.testing.assert_array_equal(watched.vector, before)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (None, "answered with the vector"),
        (np.zeros(29, np.uint16), r"expected uint16 \[30\], found uint16 \[29\]"),
        (np.zeros(30, np.uint32), "found uint32"),
        (np.full(30, 4096, np.uint16), r"below 2\*\*12, found 4096"),
    ],
)
def test_vectors_that_do_not_fit_are_the_caller_s_fault(watched, values, words):
    with pytest.raises(SecureSumError, match=words):
        client.advance(watched.states[2], watched.asked[2], watched.device, values)


def test_secrets_go_as_soon_as_they_have_served(watched):
    advertised, shared, masked, consented, revealed = watched.states[1:]
    mask, sealing, seed = advertised.mask.secret, advertised.sealing.secret, shared.seed
    assert all(secret in to_bytes(shared) for secret in (mask, sealing, seed))
    assert mask in to_bytes(masked) and sealing not in to_bytes(masked)
    for state in (consented, revealed):
        assert not any(secret in to_bytes(state) for secret in (mask, sealing, seed))
    for state in (advertised, shared, masked, consented):
        for secret in (mask, sealing, seed):
            assert repr(secret) not in repr(state)


def test_whoever_has_refused_has_no_secrets_left_and_stays_out(watched):
    parsed = decode(watched.asked[1])
    assert isinstance(parsed, PeerKeys)
    state = watched.states[1]
    fewer = encode(replace(parsed, keys=parsed.keys[:2]))
    ended, refusal = client.advance(state, fewer, watched.device)
    assert isinstance(ended, client.Ended) and isinstance(refusal, Refusal) and refusal.final
    assert refusal.reason is Reason.TOO_FEW_PEERS and "2 neighbours sent keys" in refusal.detail
    assert state.mask.secret not in to_bytes(ended) and from_bytes(to_bytes(ended)) == ended
    after, answer = client.advance(ended, watched.asked[1], watched.device)
    assert after == ended and answer.reason is Reason.ENDED and not answer.final


def test_shares_that_cannot_be_opened_cost_one_holder_and_no_more(watched):
    parsed = decode(watched.asked[2])
    assert isinstance(parsed, PeerShares)
    (first, box), *rest = parsed.sealed
    spoilt = encode(replace(parsed, sealed=((first, box[:-1] + bytes([box[-1] ^ 1])), *rest)))
    after, answer = client.advance(watched.states[2], spoilt, watched.device, watched.vector)
    assert isinstance(answer, bytes) and isinstance(after, client.Masked)
    assert set(after.peers) - set(after.held) == {first}
    # the vector is masked towards that neighbour all the same
    assert answer == watched.answers[2]


def test_shares_are_for_each_neighbour_and_different(watched):
    parsed = decode(watched.answers[1])
    assert isinstance(parsed, SealedShares)
    assert [peer for peer, _ in parsed.sealed] == [0, 1, 3, 4]
    assert len({box for _, box in parsed.sealed}) == 4


def test_signatures_of_the_wrong_size_are_the_signer_s_fault(watched):
    for size in (0, 513):
        device = replace(watched.device, sign=lambda _, size=size: bytes(size))
        with pytest.raises(SecureSumError, match="signature: expected 1 to 512"):
            client.advance(None, watched.asked[0], device)


def test_two_attempts_share_no_secret():
    room, context = attempt_with(3, values=3, bits=8, terms=Terms(), rng=np.random.default_rng(0))
    message = encode(Announcement(context=context))
    device = room.devices[context.names[0]]
    first, second = (client.advance(None, message, device)[0] for _ in range(2))
    assert first.mask.secret != second.mask.secret != first.sealing.secret


def test_consent_is_a_signature_of_list_and_attempt(watched):
    message = decode(watched.answers[3])
    assert isinstance(message, Consent)
    statement = b"fedloom secure sum survivors\0" + watched.context.digest()
    statement += b"\5\0\0\0" + b"".join(bytes([p, 0, 0, 0]) for p in range(5))
    assert watched.room.members.verify(ME, statement, message.signature)


@given(data=st.data())
def test_kept_states_that_changed_are_refused(watched, data):
    blob = bytearray(to_bytes(data.draw(st.sampled_from(watched.states[1:]))))
    at, bit = data.draw(st.integers(0, len(blob) - 1)), data.draw(st.integers(0, 7))
    blob[at] ^= 1 << bit
    with pytest.raises(SecureMessageError):
        from_bytes(bytes(blob))
    cut = data.draw(st.integers(0, len(blob) - 1))
    with pytest.raises(SecureMessageError):
        from_bytes(bytes(blob[:cut]))


@given(data=st.data())
def test_kept_states_are_read_strictly_even_with_the_right_checksum(watched, data):
    import hashlib

    blob = bytearray(to_bytes(data.draw(st.sampled_from(watched.states[1:])))[:-32])
    at, bit = data.draw(st.integers(0, len(blob) - 1)), data.draw(st.integers(0, 7))
    blob[at] ^= 1 << bit
    changed = bytes(blob) + hashlib.sha256(blob).digest()
    try:
        state = from_bytes(changed)
    except SecureMessageError:
        return
    assert to_bytes(state) == changed


def test_a_whole_attempt_leaves_every_client_done():
    room, context = attempt_with(4, values=3, bits=8, terms=Terms(), rng=np.random.default_rng(0))
    play(room, context, lost={context.names[0]: Stage.VECTORS})
    kinds = {name: type(from_bytes(kept)) for name, kept in room.states.items()}
    assert kinds.pop(context.names[0]) is client.Shared
    assert set(kinds.values()) == {client.Revealed}
