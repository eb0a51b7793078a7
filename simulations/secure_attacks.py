# SPDX-License-Identifier: Apache-2.0
"""Servers that do not keep to the protocol, each written out, and what honest clients make of them.

A script plays an attempt up to the point where it cheats, tells its lies, and carries on as far as
clients let it. It is *held off* if every client that it lied to has left the attempt for the reason
named, and what it was told in all gives it no sum but that of everybody, and no client's two
secrets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from aggregation.secure_aggregation import keys, server
from aggregation.secure_aggregation.context import HASH_BYTES, Context, Terms
from aggregation.secure_aggregation.messages import (
    Advertisement,
    Announcement,
    Consent,
    Evidence,
    PeerKey,
    PeerKeys,
    PeerShares,
    SealedShares,
    Survivors,
    decode,
    encode,
    keys_statement,
    survivors_statement,
)
from aggregation.secure_aggregation.outcomes import Reason, Refusal
from aggregation.secure_aggregation.server import Outgoing
from aggregation.secure_aggregation.server_state import ServerState, Stage
from simulations.secure_rounds import (
    Learned,
    Room,
    attempt_with,
    learned,
    with_plan,
)

CLIENTS: Final = 6
VALUES: Final = 40
BITS: Final = 12
TERMS: Final = Terms(corrupt=0.17, dropouts=0.17)  # of six, one each: 5 holders, threshold 4
RING: Final = 24
RING_TERMS: Final = Terms(corrupt=0.05, dropouts=0.1)  # of 24: a ring with fewer than 23 neighbours
VICTIM: Final = "client-0000"
PEER: Final = "client-0001"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What a script left: whom it lied to, and the context that their answers belong to."""

    room: Room
    context: Context
    lied_to: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A script's result."""

    held_off: bool
    refusals: Mapping[str, Refusal]  # the one that ended the attempt, for each client that has
    learned: Learned


Script = Callable[[], Scene]


def judge(script: Script, reason: Reason) -> Judged:
    """Plays the script, and looks at everything that its server was told."""
    scene = script()
    ended = {name: refusal for name, refusal in scene.room.refusals if refusal.final}
    knows = learned(scene.room, scene.context)
    held = (
        all(name in ended and ended[name].reason is reason for name in scene.lied_to)
        and not knows.both
        and not knows.gave_both
        and set(knows.sums) <= {frozenset(scene.context.names)}
    )
    return Judged(held_off=held, refusals=ended, learned=knows)


def _fresh(count: int = CLIENTS, terms: Terms = TERMS) -> tuple[Room, Context]:
    return attempt_with(count, values=VALUES, bits=BITS, terms=terms, rng=np.random.default_rng(0))


def _until(room: Room, context: Context, stage: Stage) -> tuple[ServerState, Outgoing]:
    """An honest attempt up to the messages of `stage`, which are not sent."""
    state, out = server.open_attempt(context)
    while state.stage < stage:
        for name, message in out.items():
            answer = room.tell(name, message)
            assert isinstance(answer, bytes), answer
            state, fault = server.receive(state, name, answer, room.members.verify)
            assert fault is None, fault
        state, result = server.close_stage(state)
        assert isinstance(result, Mapping), result
        out = result
    return state, out


def _listed(context: Context, without: Iterable[str] = ()) -> tuple[int, ...]:
    gone = set(without)
    return tuple(place for place, name in enumerate(context.names) if name not in gone)


def _list(context: Context, without: Iterable[str] = ()) -> bytes:
    return encode(Survivors(attempt=context.digest(), members=_listed(context, without)))


def _evidence(
    context: Context, to: str, signatures: Mapping[str, bytes], without: Iterable[str] = ()
) -> bytes:
    """All the signatures that there are but the receiver's own."""
    found = {context.names.index(name): raw for name, raw in signatures.items() if name != to}
    return encode(
        Evidence(
            attempt=context.digest(),
            members=_listed(context, without),
            signatures=tuple(sorted(found.items())),
        )
    )


def _signature(answer: bytes | Refusal) -> bytes:
    assert isinstance(answer, bytes), answer
    consent = decode(answer)
    assert isinstance(consent, Consent)
    return consent.signature


def _changed_keys(message: bytes, change: Callable[[int, Advertisement], Advertisement]) -> bytes:
    parsed = decode(message)
    assert isinstance(parsed, PeerKeys)
    found = tuple(
        PeerKey(peer=key.peer, advertisement=change(key.peer, key.advertisement))
        for key in parsed.keys
    )
    return encode(replace(parsed, keys=found))


def both_secrets_of_one_peer() -> Scene:
    """One list with the peer, and when that is signed another one without it."""
    room, context = _fresh()
    _, lists = _until(room, context, Stage.CONSENTS)
    others = tuple(name for name in context.names if name != PEER)
    first = {name: _signature(room.tell(name, lists[name])) for name in others}
    for name in others:
        room.tell(name, _list(context, [PEER]))
    for name in others:
        room.tell(name, _evidence(context, name, first))
    return Scene(room=room, context=context, lied_to=others)


def alive_to_some_dead_to_others() -> Scene:
    """Half are told that the peer survived and half that it did not; all signatures go to all."""
    room, context = _fresh()
    _until(room, context, Stage.CONSENTS)
    others = [name for name in context.names if name != PEER]
    without = {name: [PEER] if at % 2 else [] for at, name in enumerate(others)}
    signed = {name: _signature(room.tell(name, _list(context, without[name]))) for name in others}
    for name in others:
        room.tell(name, _evidence(context, name, signed, without[name]))
    return Scene(room=room, context=context, lied_to=tuple(others))


def alive_to_some_dead_to_others_each_with_its_own() -> Scene:
    """The same, and each is shown the signatures that fit its list: too few of them."""
    room, context = _fresh()
    _until(room, context, Stage.CONSENTS)
    others = [name for name in context.names if name != PEER]
    without = {name: [PEER] if at % 2 else [] for at, name in enumerate(others)}
    signed = {name: _signature(room.tell(name, _list(context, without[name]))) for name in others}
    for name in others:
        fits = {other: raw for other, raw in signed.items() if without[other] == without[name]}
        room.tell(name, _evidence(context, name, fits, without[name]))
    return Scene(room=room, context=context, lied_to=tuple(others))


def unmasking_again_with_another_list() -> Scene:
    """All goes well to the end; then evidence comes that the peer had not survived."""
    room, context = _fresh()
    _, evidence = _until(room, context, Stage.REVEALS)
    for name, message in evidence.items():
        room.tell(name, message)
    others = tuple(name for name in context.names if name != PEER)
    for name in others:
        parsed = decode(evidence[name])
        assert isinstance(parsed, Evidence)
        room.tell(name, encode(replace(parsed, members=_listed(context, [PEER]))))
    return Scene(room=room, context=context, lied_to=others)


def threshold_of_half() -> Scene:
    """Announces a threshold with which two halves could each give a secret."""
    room, context = _fresh()
    lied = replace(context, threshold=context.degree // 2)
    return _announced(room, lied)


def lower_floor() -> Scene:
    """Announces a smaller floor of survivors than the job has."""
    room, context = _fresh()
    return _announced(room, replace(context, min_survivors=2))


def sparser_graph() -> Scene:
    """Announces fewer neighbours than the job's bounds ask for."""
    room, context = _fresh()
    return _announced(room, replace(context, degree=2, threshold=2))


def _announced(room: Room, context: Context) -> Scene:
    for name in context.names:
        room.tell(name, encode(Announcement(context=context)))
    return Scene(room=room, context=context, lied_to=context.names)


def swapped_key() -> Scene:
    """Puts keys of its own in the place of the peer's."""
    room, context = _fresh()
    _, out = _until(room, context, Stage.SHARES)
    pair = keys.new_pair()

    def change(peer: int, found: Advertisement) -> Advertisement:
        return replace(found, mask_key=pair.public) if context.names[peer] == PEER else found

    return _told(room, context, out, change, but=PEER)


def _told(
    room: Room,
    context: Context,
    out: Outgoing,
    change: Callable[[int, Advertisement], Advertisement],
    *,
    but: str,
) -> Scene:
    others = tuple(name for name in context.names if name != but)
    for name in others:
        room.tell(name, _changed_keys(out[name], change))
    return Scene(room=room, context=context, lied_to=others)


def keys_of_another_round() -> Scene:
    """Shows the keys that the peer signed in an earlier round, as they were."""
    return _replayed(relabelled=False)


def keys_of_another_round_relabelled() -> Scene:
    """The same, with this round's digest beside them."""
    return _replayed(relabelled=True)


def _replayed(*, relabelled: bool) -> Scene:
    room, context = _fresh()
    earlier = replace(context, task=replace(context.task, round=0))
    device = room.devices[PEER]
    pair = keys.new_pair()  # stands for keys whose secrets have become known since
    statement = keys_statement(earlier.digest(), PEER, pair.public, pair.public)
    old = Advertisement(
        attempt=context.digest() if relabelled else earlier.digest(),
        sealing_key=pair.public,
        mask_key=pair.public,
        signature=device.sign(statement),
    )
    _, out = _until(room, context, Stage.SHARES)
    return _told(room, context, out, lambda p, f: old if context.names[p] == PEER else f, but=PEER)


def other_model_to_some() -> Scene:
    """Half of the clients are sent another model, each half with an announcement that fits."""
    room, context = _fresh()
    other = replace(context, task=replace(context.task, plan=bytes(HASH_BYTES)))
    half = context.names[::2]
    for name in half:
        room.devices[name] = with_plan(room.devices[name], bytes(HASH_BYTES))
    adverts: dict[str, Advertisement] = {}
    for name in context.names:
        own = other if name in half else context
        answer = room.tell(name, encode(Announcement(context=own)))
        assert isinstance(answer, bytes)
        advertisement = decode(answer)
        assert isinstance(advertisement, Advertisement)
        adverts[name] = advertisement
    for name in context.names:
        found = tuple(
            PeerKey(peer=place, advertisement=adverts[peer])
            for place, peer in enumerate(context.names)
            if peer != name
        )
        own = other if name in half else context
        room.tell(name, encode(PeerKeys(attempt=own.digest(), keys=found)))
    return Scene(room=room, context=context, lied_to=context.names)


def model_that_was_not_sent() -> Scene:
    """Announces a sum over another model than the one that came with the plan."""
    room, context = _fresh()
    return _announced(room, replace(context, task=replace(context.task, plan=bytes(HASH_BYTES))))


def dead_to_itself() -> Scene:
    """Tells a client that it is not among the survivors, and asks it to sign that."""
    room, context = _fresh()
    _until(room, context, Stage.CONSENTS)
    room.tell(VICTIM, _list(context, [VICTIM]))
    return Scene(room=room, context=context, lied_to=(VICTIM,))


def neighbour_not_of_the_graph() -> Scene:
    """Puts a client among the victim's neighbours that does not stand near it on the ring."""
    room, context = _fresh(RING, RING_TERMS)
    state, out = _until(room, context, Stage.SHARES)
    place = context.names.index(VICTIM)
    stranger = next(p for p in range(RING) if p != place and p not in state.edges[place])
    parsed = decode(out[VICTIM])
    assert isinstance(parsed, PeerKeys)
    extra = PeerKey(peer=stranger, advertisement=state.advertised[stranger])
    found = tuple(sorted((*parsed.keys, extra), key=lambda key: key.peer))
    room.tell(VICTIM, encode(replace(parsed, keys=found)))
    return Scene(room=room, context=context, lied_to=(VICTIM,))


def names_that_are_not_enrolled() -> Scene:
    """Fills the list with clients of its own making, and signs for them."""
    room, honest = _fresh()
    names = tuple(sorted((*honest.names[:3], *(f"client-9{n:03d}" for n in range(3)))))
    context = replace(honest, names=names)
    pairs = {name: keys.new_pair() for name in names}
    adverts = {}
    for name in names:
        if name in room.devices:
            answer = room.tell(name, encode(Announcement(context=context)))
            assert isinstance(answer, bytes)
            adverts[name] = decode(answer)
        else:
            adverts[name] = Advertisement(
                attempt=context.digest(),
                sealing_key=pairs[name].public,
                mask_key=pairs[name].public,
                signature=bytes(32),
            )
    honest_ones = names[:3]
    for name in honest_ones:
        found = tuple(
            PeerKey(peer=place, advertisement=adverts[peer])
            for place, peer in enumerate(names)
            if peer != name
        )
        room.tell(name, encode(PeerKeys(attempt=context.digest(), keys=found)))
    return Scene(room=room, context=context, lied_to=honest_ones)


def too_few_survivors() -> Scene:
    """A list that leaves too little company to hide in."""
    room, context = _fresh(terms=replace(TERMS, min_survivors=5))
    _until(room, context, Stage.CONSENTS)
    kept = context.names[:4]
    for name in kept:
        room.tell(name, _list(context, context.names[4:]))
    return Scene(room=room, context=context, lied_to=kept)


def too_few_neighbours_survive() -> Scene:
    """The same below the threshold, where the job has no higher floor."""
    room, context = _fresh()
    _until(room, context, Stage.CONSENTS)
    kept = context.names[:4]
    for name in kept:
        room.tell(name, _list(context, context.names[4:]))
    return Scene(room=room, context=context, lied_to=kept)


def forged_consents() -> Scene:
    """Signs a list for the others, of which only the victim has heard."""
    room, context = _fresh()
    _until(room, context, Stage.CONSENTS)
    room.tell(VICTIM, _list(context, [PEER]))
    forged = {name: bytes(32) for name in context.names if name not in (VICTIM, PEER)}
    room.tell(VICTIM, _evidence(context, VICTIM, forged, [PEER]))
    return Scene(room=room, context=context, lied_to=(VICTIM,))


def consents_of_another_list() -> Scene:
    """Honest signatures of the whole list, shown beside one without the peer."""
    room, context = _fresh()
    _, lists = _until(room, context, Stage.CONSENTS)
    signed = {
        name: _signature(room.tell(name, lists[name])) for name in context.names if name != VICTIM
    }
    room.tell(VICTIM, _list(context, [PEER]))
    del signed[PEER]
    room.tell(VICTIM, _evidence(context, VICTIM, signed, [PEER]))
    return Scene(room=room, context=context, lied_to=(VICTIM,))


def evidence_for_another_list() -> Scene:
    """All sign the whole list; the evidence then is of one without the peer."""
    room, context = _fresh()
    _, lists = _until(room, context, Stage.CONSENTS)
    others = tuple(name for name in context.names if name != PEER)
    signed = {name: _signature(room.tell(name, lists[name])) for name in others}
    for name in others:
        room.tell(name, _evidence(context, name, signed, [PEER]))
    return Scene(room=room, context=context, lied_to=others)


def signatures_of_the_dead() -> Scene:
    """Makes up the number with a client that helps the server, and is not on the list itself."""
    room, context = _fresh()
    _until(room, context, Stage.CONSENTS)
    others = tuple(name for name in context.names if name != PEER)
    signed = {name: _signature(room.tell(name, _list(context, [PEER]))) for name in others}
    del signed[others[-1]]
    statement = survivors_statement(context.digest(), _listed(context, [PEER]))
    signed[PEER] = room.devices[PEER].sign(statement)
    for name in others[:-1]:
        room.tell(name, _evidence(context, name, signed, [PEER]))
    return Scene(room=room, context=context, lied_to=others[:-1])


def shares_of_a_peer_without_keys() -> Scene:
    """Withholds the peer's keys, and later shows what it has sealed."""
    room, context = _fresh()
    state, out = _until(room, context, Stage.SHARES)
    gone = context.names.index(PEER)
    parsed = decode(out[VICTIM])
    assert isinstance(parsed, PeerKeys)
    kept = tuple(key for key in parsed.keys if key.peer != gone)
    answer = room.tell(VICTIM, encode(replace(parsed, keys=kept)))
    assert isinstance(answer, bytes), answer
    own = decode(answer)
    assert isinstance(own, SealedShares)
    (_, box), *_ = own.sealed
    sealed = tuple((place, box) for place in range(len(context.names)) if place)
    room.tell(VICTIM, encode(PeerShares(attempt=state.attempt, sealed=sealed)))
    return Scene(room=room, context=context, lied_to=(VICTIM,))


def masks_of_too_few_peers() -> Scene:
    """Withholds most neighbours' shares, so that hardly a mask would stand between."""
    room, context = _fresh()
    _, out = _until(room, context, Stage.VECTORS)
    parsed = decode(out[VICTIM])
    assert isinstance(parsed, PeerShares)
    room.tell(VICTIM, encode(replace(parsed, sealed=parsed.sealed[:3])))
    return Scene(room=room, context=context, lied_to=(VICTIM,))


def second_vector_under_other_masks() -> Scene:
    """Asks for the vector again with one neighbour less, to have one mask as the difference."""
    room, context = _fresh()
    _, out = _until(room, context, Stage.VECTORS)
    room.tell(VICTIM, out[VICTIM])
    parsed = decode(out[VICTIM])
    assert isinstance(parsed, PeerShares)
    room.tell(VICTIM, encode(replace(parsed, sealed=parsed.sealed[1:])))
    return Scene(room=room, context=context, lied_to=(VICTIM,))


def key_that_agrees_with_everybody() -> Scene:
    """A client that helps the server signs a public key of zeros."""
    room, context = _fresh()
    _, out = _until(room, context, Stage.SHARES)
    statement = keys_statement(context.digest(), PEER, bytes(32), bytes(32))
    weak = Advertisement(
        attempt=context.digest(),
        sealing_key=bytes(32),
        mask_key=bytes(32),
        signature=room.devices[PEER].sign(statement),
    )
    return _told(room, context, out, lambda p, f: weak if context.names[p] == PEER else f, but=PEER)


SCRIPTS: Final[Mapping[Script, Reason]] = {
    both_secrets_of_one_peer: Reason.CONTRADICTION,
    alive_to_some_dead_to_others: Reason.FORGED_CONSENT,
    alive_to_some_dead_to_others_each_with_its_own: Reason.TOO_FEW_PEERS,
    unmasking_again_with_another_list: Reason.CONTRADICTION,
    threshold_of_half: Reason.WEAK_TERMS,
    lower_floor: Reason.WEAK_TERMS,
    sparser_graph: Reason.WEAK_TERMS,
    swapped_key: Reason.FORGED_KEYS,
    keys_of_another_round: Reason.OTHER_PLAN,
    keys_of_another_round_relabelled: Reason.FORGED_KEYS,
    other_model_to_some: Reason.OTHER_PLAN,
    model_that_was_not_sent: Reason.WRONG_TASK,
    dead_to_itself: Reason.DECLARED_DEAD,
    neighbour_not_of_the_graph: Reason.UNKNOWN_CLIENT,
    names_that_are_not_enrolled: Reason.FORGED_KEYS,
    too_few_survivors: Reason.TOO_FEW_SURVIVORS,
    too_few_neighbours_survive: Reason.TOO_FEW_PEERS,
    forged_consents: Reason.FORGED_CONSENT,
    consents_of_another_list: Reason.FORGED_CONSENT,
    evidence_for_another_list: Reason.CONTRADICTION,
    signatures_of_the_dead: Reason.UNKNOWN_CLIENT,
    shares_of_a_peer_without_keys: Reason.UNKNOWN_CLIENT,
    masks_of_too_few_peers: Reason.TOO_FEW_PEERS,
    second_vector_under_other_masks: Reason.CONTRADICTION,
    key_that_agrees_with_everybody: Reason.WEAK_KEY,
}
"""Every script with the reason that clients have to give."""
