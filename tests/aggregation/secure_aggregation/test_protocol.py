# SPDX-License-Identifier: Apache-2.0
"""Whole attempts: sums with dropouts, what a server learns, and servers that cheat."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
)

from aggregation.secure_aggregation import client, server
from aggregation.secure_aggregation.client_bytes import from_bytes
from aggregation.secure_aggregation.context import Terms
from aggregation.secure_aggregation.messages import Evidence, Reveal, Survivors, decode, encode
from aggregation.secure_aggregation.outcomes import Aborted, Reason, Refusal
from aggregation.secure_aggregation.server_state import SecureSum, Stage
from simulations.secure_attacks import SCRIPTS, judge, threshold_of_half
from simulations.secure_rounds import (
    Learned,
    attempt_with,
    below_threshold,
    learned,
    plain_sum,
    play,
)

LOSSES = (Stage.KEYS, Stage.SHARES, Stage.VECTORS, Stage.CONSENTS, Stage.REVEALS)


def rng_of(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@settings(max_examples=25)
@given(
    count=st.sampled_from([3, 5, 8, 20]),
    bits=st.integers(1, 32),
    values=st.integers(1, 70),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_the_sum_is_exact_whoever_is_lost_when(count, bits, values, seed, data):
    terms = Terms()
    room, context = attempt_with(count, values=values, bits=bits, terms=terms, rng=rng_of(seed))
    gone = data.draw(
        st.lists(st.sampled_from(context.names), max_size=int(0.33 * count), unique=True)
    )
    lost = {name: data.draw(st.sampled_from(LOSSES)) for name in gone}
    played = play(room, context, lost=lost)
    assert isinstance(played.outcome, SecureSum) and not played.faults and not room.refusals
    present = tuple(n for n in context.names if lost.get(n, Stage.OVER) > Stage.VECTORS)
    assert played.outcome.members == present
    expected = plain_sum(room.vectors, present, bits)
    assert played.outcome.values.dtype == expected.dtype
    np.testing.assert_array_equal(played.outcome.values, expected)
    assert learned(room, context) == Learned(both=(), sums=(frozenset(present),), gave_both=())


@pytest.mark.parametrize("stage", [Stage.SHARES, Stage.VECTORS, Stage.CONSENTS, Stage.REVEALS])
def test_the_sum_is_exact_on_a_ring(stage):
    terms = Terms(corrupt=0.05, dropouts=0.1)
    room, context = attempt_with(40, values=33, bits=14, terms=terms, rng=rng_of(1))
    assert context.degree < 20
    gone = [context.names[place] for place in rng_of(stage).choice(40, 4, replace=False)]
    played = play(room, context, lost=dict.fromkeys(gone, stage))
    assert isinstance(played.outcome, SecureSum)
    present = [n for n in context.names if stage > Stage.VECTORS or n not in gone]
    np.testing.assert_array_equal(played.outcome.values, plain_sum(room.vectors, present, 14))
    assert learned(room, context).sums == (frozenset(present),)


@pytest.mark.parametrize("stage", LOSSES)
@pytest.mark.parametrize("count", [3, 5, 20])
def test_below_the_threshold_there_is_no_sum(count, stage):
    room, context = attempt_with(count, values=5, bits=8, terms=Terms(), rng=rng_of(0))
    gone = context.names[-below_threshold(context) - 1 :]
    played = play(room, context, lost=dict.fromkeys(gone, stage))
    assert isinstance(played.outcome, Aborted)
    assert played.outcome.reason in (Reason.TOO_FEW_PEERS, Reason.TOO_FEW_SURVIVORS)
    assert learned(room, context) == Learned(both=(), sums=(), gave_both=())


def test_a_floor_above_the_threshold_holds():
    terms = Terms(min_survivors=19)
    room, context = attempt_with(20, values=5, bits=8, terms=terms, rng=rng_of(0))
    lost = dict.fromkeys(context.names[:2], Stage.VECTORS)
    played = play(room, context, lost=lost)
    assert isinstance(played.outcome, Aborted)
    assert played.outcome.reason is Reason.TOO_FEW_SURVIVORS and "18 clients" in (
        played.outcome.detail
    )


@pytest.mark.parametrize(
    ("script", "reason"), SCRIPTS.items(), ids=lambda v: getattr(v, "__name__", None)
)
def test_a_cheating_server_gets_nothing(script, reason):
    judged = judge(script, reason)
    assert judged.held_off, (judged.refusals, judged.learned)


@settings(max_examples=40)
@given(
    shape=st.sampled_from([(4, 0.0), (5, 0.0), (6, 0.0), (7, 0.0), (22, 0.05)]),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_a_server_that_lies_at_random_learns_one_large_sum_at_most(shape, seed, data):
    """Shares withheld in either direction, two lists, some not asked to sign, any evidence that
    fits: whatever of it clients accept gives no two secrets, and no sum of a few."""
    count, dropouts = shape
    terms = Terms(corrupt=0.0, dropouts=dropouts)
    rng = rng_of(seed)
    room, context = attempt_with(count, values=4, bits=9, terms=terms, rng=rng)
    names, complete = context.names, context.degree == count - 1
    spare = context.degree - context.threshold
    state, out = server.open_attempt(context)
    for stage in (Stage.KEYS, Stage.SHARES):
        assert state.stage is stage
        for name, message in out.items():
            state, _ = server.receive(state, name, room.tell(name, message), room.members.verify)
        state, out = server.close_stage(state)
    withheld = data.draw(st.integers(0, spare))
    for name, message in out.items():
        parsed = decode(message)
        gone = set(rng.choice(len(parsed.sealed), rng.integers(withheld + 1), replace=False))
        kept = tuple(box for at, box in enumerate(parsed.sealed) if at not in gone)
        assert isinstance(room.tell(name, encode(replace(parsed, sealed=kept))), bytes)
    lists = []
    for _ in range(2):
        dead = rng.choice(count, data.draw(st.integers(0, min(spare, count - 3))), replace=False)
        lists.append(tuple(place for place in range(count) if place not in dead))
    start, width = int(rng.integers(count)), data.draw(st.integers(0, count))
    told = {name: lists[(at - start) % count < width] for at, name in enumerate(names)}
    unasked = set(rng.choice(count, data.draw(st.integers(0, spare)), replace=False).tolist())
    signed = {}
    for at, name in enumerate(names):
        if at in told[name] and at not in unasked:
            answer = room.tell(name, encode(Survivors(attempt=state.attempt, members=told[name])))
            if isinstance(answer, bytes):
                signed[at] = decode(answer).signature
    for at in signed:
        mine = told[names[at]]
        peers = from_bytes(room.states[names[at]]).peers
        fits = tuple(
            (peer, signature)
            for peer, signature in sorted(signed.items())
            if peer in peers and peer in mine and told[names[peer]] == mine
        )
        room.tell(names[at], encode(Evidence(attempt=state.attempt, members=mine, signatures=fits)))
    found = learned(room, context)
    assert not found.both and not found.gave_both
    assert all(len(group) > 1 for group in found.sums)
    if complete:
        assert len(found.sums) <= 1
        assert all(len(group) > context.threshold for group in found.sums)
    event(f"{len(found.sums)} sums, {'complete' if complete else 'ring'}")


def test_a_threshold_of_half_is_refused_for_what_it_is():
    refusals = judge(threshold_of_half, Reason.WEAK_TERMS).refusals
    assert {r.detail for r in refusals.values()} == {
        "a threshold of 2 is half of 5 holders or less: both secrets of a client could be put "
        "together"
    }


def test_too_few_consents_end_the_attempt_before_anybody_reveals():
    room, context = attempt_with(5, values=5, bits=8, terms=Terms(), rng=rng_of(0))
    played = play(room, context, lost=dict.fromkeys(context.names[:2], Stage.CONSENTS))
    assert isinstance(played.outcome, Aborted) and "signed the list" in played.outcome.detail
    assert not any(isinstance(decode(answer), Reveal) for _, answer in room.heard)


def test_careless_clients_would_be_found_out():
    """The checker sees a breach where there is one: here all holders give both of their shares."""
    room, context = attempt_with(4, values=5, bits=8, terms=Terms(), rng=rng_of(0))
    state, out = server.open_attempt(context)
    while state.stage < Stage.REVEALS:
        for name, message in out.items():
            state, _ = server.receive(state, name, room.tell(name, message), room.members.verify)
        state, out = server.close_stage(state)
    assert learned(room, context) == Learned(both=(), sums=(), gave_both=())
    for name, kept in room.states.items():
        held = from_bytes(kept).held
        both = Reveal(
            attempt=context.digest(),
            seeds=tuple((owner, shares.seed) for owner, shares in held.items()),
            mask_keys=tuple((owner, shares.mask_key) for owner, shares in held.items()),
        )
        room.heard.append((name, encode(both)))
    found = learned(room, context)
    assert found.both == found.gave_both == context.names
    assert set(found.sums) == {frozenset({name}) for name in context.names}


@pytest.mark.parametrize("kind", ["seeds", "mask_keys"])
def test_one_false_holder_is_got_by_without(kind):
    room, context = attempt_with(7, values=5, bits=8, terms=Terms(), rng=rng_of(0))
    played = _with_false_shares(room, context, kind, liars=1)
    assert isinstance(played, SecureSum) and len(played.members) == 6
    np.testing.assert_array_equal(played.values, plain_sum(room.vectors, played.members, 8))


@pytest.mark.parametrize("kind", ["seeds", "mask_keys"])
def test_false_shares_that_nobody_can_mend_are_named(kind):
    room, context = attempt_with(7, values=5, bits=8, terms=Terms(), rng=rng_of(0))
    played = _with_false_shares(room, context, kind, liars=5)
    assert isinstance(played, Aborted) and played.reason is Reason.FALSE_SHARES
    expected = context.names[-1] if kind == "mask_keys" else context.names[0]
    assert played.names == (expected,) and expected in played.detail


def _with_false_shares(room, context, kind, *, liars):
    """The last client is lost before its vector; of the others the first ones lie."""
    state, out = server.open_attempt(context)
    while True:
        for name, message in out.items():
            if name == context.names[-1] and state.stage is Stage.VECTORS:
                continue
            answer = room.tell(name, message)
            if state.stage is Stage.REVEALS and name in context.names[:liars]:
                parsed = decode(answer)
                # Bits that X25519 looks at, and no pattern in them: single bits can cancel out
                # over the few small coefficients of four holders.
                wrong = int.from_bytes(sha256(name.encode()).digest()[:24], "big") << 8
                false = tuple((owner, share ^ wrong) for owner, share in getattr(parsed, kind))
                answer = encode(replace(parsed, **{kind: false}))
            state, fault = server.receive(state, name, answer, room.members.verify)
            assert fault is None
        state, result = server.close_stage(state)
        if isinstance(result, SecureSum | Aborted):
            return result
        out = result


class Disorder(RuleBasedStateMachine):
    """Messages are lost, come twice, late and in any order, and stages close at any time; what was
    sent stays out there for ever."""

    to_clients = Bundle("to_clients")
    to_server = Bundle("to_server")

    def __init__(self):
        super().__init__()
        self.first = {}
        self.outcome = None

    @initialize(target=to_clients, count=st.sampled_from([4, 5]))
    def open(self, count):
        terms = Terms(corrupt=0.0, dropouts=0.2)
        self.room, self.context = attempt_with(
            count, values=3, bits=9, terms=terms, rng=rng_of(count)
        )
        self.state, out = server.open_attempt(self.context)
        self.last = out
        return multiple(*out.items())

    @rule(target=to_clients, skipped=st.none() | st.integers(0, 4))
    def a_stage_goes_well(self, skipped):
        """But for one client perhaps; otherwise hardly an attempt would come to its end."""
        for at, (name, message) in enumerate(self.last.items()):
            if at != skipped and name in self.state.waiting_for():
                answer = self.room.tell(name, message)
                if not isinstance(answer, Refusal):
                    assert self.first.setdefault((name, message), answer) == answer
                    self.state, fault = server.receive(
                        self.state, name, answer, self.room.members.verify
                    )
                    assert fault is None
        return self.a_stage_is_closed()

    @rule(target=to_server, sent=to_clients)
    def a_client_hears(self, sent):
        name, message = sent
        answer = self.room.tell(name, message)
        if isinstance(answer, Refusal):
            # an honest server's messages can only be early or late
            assert not answer.final and answer.reason is Reason.OUT_OF_ORDER
            return multiple()
        assert self.first.setdefault((name, message), answer) == answer
        return (name, answer)

    @rule(sent=to_server)
    def the_server_hears(self, sent):
        self.state, fault = server.receive(self.state, *sent, self.room.members.verify)
        assert fault is None or (fault.reason is Reason.OUT_OF_ORDER and not fault.dropped)

    @rule(target=to_clients)
    def a_stage_is_over(self):
        # of fewer answers nothing comes but an end, and that is reached soon enough
        return multiple() if len(self.state.waiting_for()) > 1 else self.a_stage_is_closed()

    def a_stage_is_closed(self):
        if self.outcome is not None:
            return multiple()
        self.state, result = server.close_stage(self.state)
        if isinstance(result, SecureSum | Aborted):
            self.outcome = result
            return multiple()
        self.last = result
        return multiple(*result.items())

    @rule(sent=to_clients, at=st.integers(0, 10_000), bit=st.integers(0, 7))
    def bytes_change_on_the_way(self, sent, at, bit):
        """To a client that then is as it was, or out; what it says is lost."""
        name, message = sent
        changed = bytearray(message)
        changed[at % len(changed)] ^= 1 << bit
        before = self.room.states.get(name)
        state = from_bytes(before) if before is not None else None
        values = self.room.vectors[name]
        after, answer = client.advance(state, bytes(changed), self.room.devices[name], values)
        if isinstance(answer, Refusal) and not answer.final:
            assert after == state

    @invariant()
    def nothing_more_than_the_sum_is_known(self):
        if not hasattr(self, "room"):
            return
        found = learned(self.room, self.context)
        assert not found.both and not found.gave_both
        names = self.context.names
        survivors = frozenset(names[place] for place in self.state.survivors)
        assert set(found.sums) <= {survivors}
        if isinstance(self.outcome, SecureSum):
            assert frozenset(self.outcome.members) == survivors
            expected = plain_sum(self.room.vectors, self.outcome.members, 9)
            np.testing.assert_array_equal(self.outcome.values, expected)


TestDisorder = Disorder.TestCase
TestDisorder.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
