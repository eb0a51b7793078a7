# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from aggregation.errors import SecureMessageError, SecureSumError
from aggregation.secure_aggregation import server
from aggregation.secure_aggregation.context import Terms
from aggregation.secure_aggregation.messages import (
    Advertisement,
    Consent,
    MaskedInput,
    Reveal,
    SealedShares,
    decode,
    encode,
    keys_statement,
)
from aggregation.secure_aggregation.outcomes import Aborted, Reason
from aggregation.secure_aggregation.server_state import SecureSum, Stage
from simulations.secure_rounds import attempt_with, plain_sum

BAD = "client-0003"


def run(change, *, at, count=6, values=20, bits=10, terms=None, honest_too=False):
    """An attempt in which one client's answer of one stage goes through `change`."""
    terms = terms or Terms(corrupt=0.0, dropouts=0.2)
    room, context = attempt_with(
        count, values=values, bits=bits, terms=terms, rng=np.random.default_rng(0)
    )
    verify = room.members.verify
    state, out = server.open_attempt(context)
    faults = []
    while True:
        for name, message in out.items():
            answer = room.tell(name, message)
            assert isinstance(answer, bytes)
            sent = [answer]
            if name == BAD and state.stage is at:
                changed = change(answer, room, context)
                sent = [changed, answer] if honest_too else [changed]
            for each in sent:
                before = state
                state, fault = server.receive(state, name, each, verify)
                if fault is not None:
                    faults.append(fault)
                    assert fault.dropped or state == before
        state, result = server.close_stage(state)
        if isinstance(result, SecureSum | Aborted):
            return room, context, faults, result
        out = result


def parsed(answer, kind):
    message = decode(answer)
    assert isinstance(message, kind)
    return message


def wrong_signature(answer, room, context):
    return encode(replace(parsed(answer, Advertisement), signature=bytes(32)))


def weak_key(answer, room, context):
    statement = keys_statement(context.digest(), BAD, bytes(32), bytes(32))
    return encode(
        Advertisement(
            attempt=context.digest(),
            sealing_key=bytes(32),
            mask_key=bytes(32),
            signature=room.devices[BAD].sign(statement),
        )
    )


def consent_to_nothing(answer, room, context):
    return encode(replace(parsed(answer, Consent), signature=bytes(32)))


def shares_for_some(answer, room, context):
    message = parsed(answer, SealedShares)
    return encode(replace(message, sealed=message.sealed[1:]))


def short_vector(answer, room, context):
    message = parsed(answer, MaskedInput)
    return encode(replace(message, payload=bytes(message.payload)[:-1]))


def unused_bits(answer, room, context):
    # 21 values of 10 bits leave 6 of the last byte
    message = parsed(answer, MaskedInput)
    payload = bytearray(message.payload)
    payload[-1] |= 0x80
    return encode(replace(message, payload=bytes(payload)))


def seed_of_a_stranger(answer, room, context):
    message = parsed(answer, Reveal)
    own = context.names.index(BAD)
    return encode(replace(message, seeds=tuple(sorted((*message.seeds, (own, 1))))))


def mask_key_of_a_survivor(answer, room, context):
    message = parsed(answer, Reveal)
    (owner, _), *rest = message.seeds
    return encode(replace(message, seeds=tuple(rest), mask_keys=((owner, 1),)))


def noise(answer, room, context):
    return b"\xff" * 50


def cut(answer, room, context):
    return answer[:-1]


@pytest.mark.parametrize(
    ("change", "at", "reason"),
    [
        (noise, Stage.KEYS, Reason.MALFORMED),
        (cut, Stage.KEYS, Reason.MALFORMED),
        (wrong_signature, Stage.KEYS, Reason.FORGED_KEYS),
        (weak_key, Stage.KEYS, Reason.WEAK_KEY),
        (noise, Stage.SHARES, Reason.MALFORMED),
        (shares_for_some, Stage.SHARES, Reason.MALFORMED),
        (noise, Stage.VECTORS, Reason.MALFORMED),
        (short_vector, Stage.VECTORS, Reason.MALFORMED),
        (unused_bits, Stage.VECTORS, Reason.MALFORMED),
        (noise, Stage.CONSENTS, Reason.MALFORMED),
        (consent_to_nothing, Stage.CONSENTS, Reason.FORGED_CONSENT),
        (noise, Stage.REVEALS, Reason.MALFORMED),
        (seed_of_a_stranger, Stage.REVEALS, Reason.MALFORMED),
        (mask_key_of_a_survivor, Stage.REVEALS, Reason.MALFORMED),
    ],
)
def test_one_client_s_fault_drops_it_and_the_sum_goes_on(change, at, reason):
    room, _, faults, result = run(change, at=at, values=21)
    assert [(f.name, f.reason, f.dropped) for f in faults] == [(BAD, reason, True)]
    assert isinstance(result, SecureSum)
    with_it = at > Stage.VECTORS
    assert (BAD in result.members) is with_it and len(result.members) == 5 + with_it
    np.testing.assert_array_equal(result.values, plain_sum(room.vectors, result.members, 10))


def test_whoever_is_dropped_stays_so():
    _, _, faults, result = run(noise, at=Stage.VECTORS, honest_too=True)
    assert [(f.reason, f.dropped) for f in faults] == [
        (Reason.MALFORMED, True), (Reason.ENDED, True),
    ]  # fmt: skip
    assert isinstance(result, SecureSum) and BAD not in result.members


def test_answers_that_repeat_or_come_late_change_nothing():
    room, context = attempt_with(4, values=5, bits=8, terms=Terms(), rng=np.random.default_rng(0))
    verify, sent = room.members.verify, []
    state, out = server.open_attempt(context)
    while True:
        for name, message in out.items():
            answer = room.tell(name, message)
            state, _ = server.receive(state, name, answer, verify)
            again, fault = server.receive(state, name, answer, verify)
            assert fault is None and again is state
            for late in sent:
                after, fault = server.receive(state, *late, verify)
                assert after is state
                assert fault.reason is Reason.OUT_OF_ORDER and not fault.dropped
        sent = [*sent, *((name, decoded) for name, decoded in room.heard[-4:])]
        state, result = server.close_stage(state)
        if isinstance(result, SecureSum):
            break
        out = result
    np.testing.assert_array_equal(result.values, plain_sum(room.vectors, context.names, 8))
    assert state.waiting_for() == ()
    after, fault = server.receive(state, *sent[0], verify)
    assert after is state and fault.reason is Reason.OUT_OF_ORDER
    with pytest.raises(SecureSumError, match="this attempt is over"):
        server.close_stage(state)


def test_a_second_vector_is_not_added():
    room, context = attempt_with(4, values=5, bits=8, terms=Terms(), rng=np.random.default_rng(0))
    state, out = server.open_attempt(context)
    while state.stage < Stage.VECTORS:
        for name, message in out.items():
            state, _ = server.receive(state, name, room.tell(name, message), room.members.verify)
        state, out = server.close_stage(state)
    name = context.names[0]
    state, _ = server.receive(state, name, room.tell(name, out[name]), room.members.verify)
    before = state.total.copy()
    other = encode(MaskedInput(attempt=context.digest(), payload=bytes(5)))
    state, fault = server.receive(state, name, other, room.members.verify)
    assert fault.reason is Reason.CONTRADICTION and not fault.dropped
    np.testing.assert_array_equal(state.total, before)
    assert state.waiting_for() == context.names[1:]


def test_strangers_and_other_attempts_are_turned_away():
    room, context = attempt_with(4, values=5, bits=8, terms=Terms(), rng=np.random.default_rng(0))
    state, out = server.open_attempt(context)
    name = context.names[0]
    answer = room.tell(name, out[name])
    after, fault = server.receive(state, "nobody", answer, room.members.verify)
    assert after is state and fault.reason is Reason.UNKNOWN_CLIENT
    # the signature holds name and keys together: another's answer is not one's own
    after, fault = server.receive(state, context.names[1], answer, room.members.verify)
    assert fault.reason is Reason.FORGED_KEYS and fault.dropped
    other = encode(replace(parsed(answer, Advertisement), attempt=bytes(32)))
    after, fault = server.receive(state, name, other, room.members.verify)
    assert after is state and fault.reason is Reason.OTHER_ATTEMPT and not fault.dropped


def test_the_running_sum_is_all_that_is_kept_of_vectors():
    values, clients = 200_000, 8
    terms = Terms(corrupt=0.0, dropouts=0.0)
    room, context = attempt_with(
        clients, values=values, bits=16, terms=terms, rng=np.random.default_rng(0)
    )
    state, out = server.open_attempt(context)
    while state.stage < Stage.VECTORS:
        for name, message in out.items():
            state, _ = server.receive(state, name, room.tell(name, message), room.members.verify)
        state, out = server.close_stage(state)
    answers = {name: room.tell(name, message) for name, message in out.items()}
    tracemalloc.start()
    peaks = []
    for name, answer in answers.items():
        state, fault = server.receive(state, name, answer, room.members.verify)
        assert fault is None
        peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    # the old sum, the new one and the vector, and what unpacking takes
    assert max(peaks) < 3 * 2 * values + 4_000_000
    assert peaks[-1] < 1.2 * peaks[1]


def test_arguments_are_not_written_to():
    room, context = attempt_with(4, values=5, bits=8, terms=Terms(), rng=np.random.default_rng(0))
    state, out = server.open_attempt(context)
    while state.stage < Stage.REVEALS:
        for name, message in out.items():
            before = None if state.total is None else state.total.copy()
            after, _ = server.receive(state, name, room.tell(name, message), room.members.verify)
            if before is not None:
                np.testing.assert_array_equal(state.total, before)
            state = after
        state, out = server.close_stage(state)
    for name, message in out.items():
        state, _ = server.receive(state, name, room.tell(name, message), room.members.verify)
    before = state.total.copy()
    for _ in range(2):
        _, result = server.close_stage(state)
        np.testing.assert_array_equal(result.values, plain_sum(room.vectors, context.names, 8))
    np.testing.assert_array_equal(state.total, before)


def test_a_degree_that_the_graph_cannot_have_is_refused():
    _, context = attempt_with(24, values=5, bits=8, terms=Terms(), rng=np.random.default_rng(0))
    with pytest.raises(SecureSumError, match="degree: expected 23"):
        server.open_attempt(replace(context, degree=5, threshold=4))
    with pytest.raises(SecureMessageError):
        replace(context, degree=24)
