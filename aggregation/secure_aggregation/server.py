# SPDX-License-Identifier: Apache-2.0
"""The server of a secure sum: it gathers the answers of one stage after another, and adds up.

    open_attempt ─→ state, announcements     receive(state, name, answer) ─→ state, fault or None
    close_stage(state) ─→ state, messages of the next stage by name, or Aborted, or SecureSum

The caller sends messages and decides when a stage has waited long enough. What a client sends that
cannot be taken drops that client and nobody else; a message that comes again is no fault. Masked
vectors are added to one running sum as they come and are not kept.

*Source* Bonawitz et al., CCS 2017; Bell et al., CCS 2020.

*Cost* for n clients of degree k: the sum is 2 or 4 bytes a value, copied once for each vector that
comes; the end is `unmasking.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Final

from aggregation.errors import CodecError, SecureMessageError, SecureSumError
from aggregation.packing import packed_bytes, unpack
from aggregation.secure_aggregation import keys
from aggregation.secure_aggregation.context import Context
from aggregation.secure_aggregation.graph import neighbours
from aggregation.secure_aggregation.keys import Verifier
from aggregation.secure_aggregation.messages import (
    MAX_SMALL_BYTES,
    Advertisement,
    Announcement,
    Consent,
    Evidence,
    MaskedInput,
    Message,
    PeerKey,
    PeerKeys,
    PeerShares,
    Reveal,
    SealedShares,
    Survivors,
    decode,
    encode,
    keys_statement,
    masked_input_bytes,
    survivors_statement,
)
from aggregation.secure_aggregation.outcomes import Aborted, Fault, Reason
from aggregation.secure_aggregation.server_state import (
    SecureSum,
    ServerState,
    Stage,
    too_few_holders,
)
from aggregation.secure_aggregation.unmasking import opened

_AWAITED: Final[dict[Stage, type]] = {
    Stage.KEYS: Advertisement,
    Stage.SHARES: SealedShares,
    Stage.VECTORS: MaskedInput,
    Stage.CONSENTS: Consent,
    Stage.REVEALS: Reveal,
}


Outgoing = Mapping[str, bytes]


def open_attempt(context: Context) -> tuple[ServerState, Outgoing]:
    """A fresh attempt and the announcement for each participant.

    Raises: SecureSumError for a degree that the graph cannot have.
    """
    message = encode(Announcement(context=context))
    state = ServerState(
        context=context,
        attempt=context.digest(),
        edges=neighbours(context.names, context.seed, context.degree),
        stage=Stage.KEYS,
        asked=frozenset(range(len(context.names))),
        answered={},
        advertised={},
        sealed={},
    )
    return state, dict.fromkeys(context.names, message)


def receive(
    state: ServerState, name: str, message: bytes | memoryview, verify: Verifier
) -> tuple[ServerState, Fault | None]:
    """The state with one client's answer in it; `name` is who sent it, by the connection."""

    def fault(reason: Reason, detail: str, *, dropped: bool) -> Fault:
        return Fault(name=name, reason=reason, detail=detail, dropped=dropped)

    if name not in state.context.names:
        return state, fault(Reason.UNKNOWN_CLIENT, "no participant", dropped=False)
    place = state.context.names.index(name)
    if place in state.dropped:
        return state, fault(Reason.ENDED, "left out before", dropped=True)
    again = state.answered.get(place)
    if again is not None and again == hashlib.sha256(message).digest():
        return state, None
    due = place in state.asked and again is None and state.stage is not Stage.OVER
    payload = packed_bytes(state.context.task.values, state.context.task.bits)
    limit = max(masked_input_bytes(payload), MAX_SMALL_BYTES)
    try:
        parsed = decode(message, max_bytes=limit)
    except SecureMessageError as error:
        return _faulty(state, place, fault(Reason.MALFORMED, str(error), dropped=due))
    if parsed.attempt != state.attempt:
        return state, fault(Reason.OTHER_ATTEMPT, "of another attempt", dropped=False)
    if not isinstance(parsed, _AWAITED.get(state.stage, ())) or place not in state.asked:
        kind = type(parsed).__name__
        return state, fault(Reason.OUT_OF_ORDER, f"{kind} is not awaited", dropped=False)
    if again is not None:
        return state, fault(Reason.CONTRADICTION, "answered otherwise before", dropped=False)
    problem = _problem(state, place, parsed, verify)
    if problem is not None:
        return _faulty(state, place, fault(*problem, dropped=True))
    try:
        after = _taken(state, place, parsed)
    except (SecureMessageError, CodecError) as error:
        return _faulty(state, place, fault(Reason.MALFORMED, str(error), dropped=True))
    answered = {**state.answered, place: hashlib.sha256(message).digest()}
    return replace(after, answered=answered), None


def _faulty(state: ServerState, place: int, fault: Fault) -> tuple[ServerState, Fault]:
    if fault.dropped:
        state = replace(state, dropped={**state.dropped, place: fault})
    return state, fault


def _problem(
    state: ServerState, place: int, message: Message, verify: Verifier
) -> tuple[Reason, str] | None:
    """What is wrong with an answer that has the right form."""
    name, attempt = state.context.names[place], state.attempt
    match message:
        case Advertisement():
            statement = keys_statement(attempt, name, message.sealing_key, message.mask_key)
            if not verify(name, statement, message.signature):
                return Reason.FORGED_KEYS, "its keys are not signed by it"
            for public in (message.sealing_key, message.mask_key):
                try:
                    keys.agree(_PROBE, public)
                except SecureSumError as error:
                    return Reason.WEAK_KEY, str(error)
        case SealedShares():
            expected = [peer for peer in state.edges[place] if peer in state.asked]
            if [peer for peer, _ in message.sealed] != expected:
                return Reason.MALFORMED, "its shares are not for the neighbours that it was told"
        case Consent():
            statement = survivors_statement(attempt, state.survivors)
            if not verify(name, statement, message.signature):
                return Reason.FORGED_CONSENT, "the list is not signed by it"
        case Reveal():
            around = {peer for peer in state.edges[place] if peer in state.holders}
            alive = set(state.survivors)
            if {owner for owner, _ in message.seeds} - (around & alive):
                return Reason.MALFORMED, "a seed of no surviving neighbour"
            if {owner for owner, _ in message.mask_keys} - (around - alive):
                return Reason.MALFORMED, "a mask key of no lost neighbour"
    return None


_PROBE: Final = bytes(range(1, 33))  # any secret shows a key of low order


def _taken(state: ServerState, place: int, message: Message) -> ServerState:
    match message:
        case Advertisement():
            return replace(state, advertised={**state.advertised, place: message})
        case SealedShares():
            return replace(state, sealed={**state.sealed, place: message})
        case MaskedInput():
            task = state.context.task
            vector = unpack(message.payload, task.values, task.bits)
            total = vector if state.total is None else state.total + vector
            return replace(state, total=total)
        case Consent():
            return replace(state, consents={**state.consents, place: message})
        case Reveal():
            return replace(state, reveals={**state.reveals, place: message})
    raise AssertionError(f"{type(message).__name__} is no answer")


def close_stage(state: ServerState) -> tuple[ServerState, Outgoing | Aborted | SecureSum]:
    """Ends the stage with the answers that there are.

    Gives the messages of the next stage, or how the attempt ended. Raises: SecureSumError after
    the end.
    """
    match state.stage:
        case Stage.KEYS:
            return _close_keys(state)
        case Stage.SHARES:
            return _close_shares(state)
        case Stage.VECTORS:
            return _close_vectors(state)
        case Stage.CONSENTS:
            return _close_consents(state)
        case Stage.REVEALS:
            return replace(state, stage=Stage.OVER), opened(state)
    raise SecureSumError("secure sum: this attempt is over; open another")


def _close_keys(state: ServerState) -> tuple[ServerState, Outgoing | Aborted]:
    stay = _with_enough(state, _answered(state))
    if short := _short(state, stay, "sent keys"):
        return _over(state, short)
    messages = {}
    for place in sorted(stay):
        found = tuple(
            PeerKey(peer=peer, advertisement=state.advertised[peer])
            for peer in state.edges[place]
            if peer in stay
        )
        messages[place] = encode(PeerKeys(attempt=state.attempt, keys=found))
    return _next(state, Stage.SHARES, messages)


def _close_shares(state: ServerState) -> tuple[ServerState, Outgoing | Aborted]:
    stay = _with_enough(state, _answered(state))
    if short := _short(state, stay, "sent shares"):
        return _over(state, short)
    boxes: dict[int, list[tuple[int, bytes]]] = {place: [] for place in sorted(stay)}
    for sender in sorted(stay):
        for receiver, box in state.sealed[sender].sealed:
            if receiver in stay:
                boxes[receiver].append((sender, box))
    messages = {
        place: encode(PeerShares(attempt=state.attempt, sealed=tuple(sealed)))
        for place, sealed in boxes.items()
    }
    commitments = {place: state.sealed[place].commitment for place in stay}
    # what was sealed has been passed on, and the server has no use for it
    after = replace(state, holders=frozenset(stay), commitments=commitments, sealed={})
    return _next(after, Stage.VECTORS, messages)


def _close_vectors(state: ServerState) -> tuple[ServerState, Outgoing | Aborted]:
    members = _answered(state)
    if short := _short(state, members, "sent vectors"):
        return _over(state, short)
    # all that shared: the mask key of whoever is lost has to come from threshold neighbours too
    if lonely := _lonely(state, state.holders, members):
        return _over(state, too_few_holders(state, lonely, "sent vectors"))
    survivors = tuple(sorted(members))
    message = encode(Survivors(attempt=state.attempt, members=survivors))
    messages = dict.fromkeys(survivors, message)
    return _next(replace(state, survivors=survivors), Stage.CONSENTS, messages)


def _close_consents(state: ServerState) -> tuple[ServerState, Outgoing | Aborted]:
    signed = _answered(state)
    # a client wants the signatures of threshold neighbours, and answers only then
    served = {place for place in signed if _count(state, place, signed) >= state.context.threshold}
    if lonely := _lonely(state, state.holders, served):
        return _over(state, too_few_holders(state, lonely, "signed the list"))
    messages = {}
    for place in sorted(served):
        signatures = tuple(
            (peer, state.consents[peer].signature) for peer in state.edges[place] if peer in signed
        )
        messages[place] = encode(
            Evidence(attempt=state.attempt, members=state.survivors, signatures=signatures)
        )
    return _next(state, Stage.REVEALS, messages)


def _over(state: ServerState, end: Aborted) -> tuple[ServerState, Aborted]:
    return replace(state, stage=Stage.OVER), end


def _next(
    state: ServerState, stage: Stage, messages: Mapping[int, bytes]
) -> tuple[ServerState, Outgoing]:
    names = state.context.names
    after = replace(state, stage=stage, asked=frozenset(messages), answered={})
    return after, {names[place]: message for place, message in messages.items()}


def _answered(state: ServerState) -> set[int]:
    return {place for place in state.answered if place not in state.dropped}


def _count(state: ServerState, place: int, among: Collection[int]) -> int:
    return sum(peer in among for peer in state.edges[place])


def _with_enough(state: ServerState, places: set[int]) -> set[int]:
    """Those with threshold neighbours among themselves: others would only refuse."""
    stay = set(places)
    while True:
        enough = {p for p in stay if _count(state, p, stay) >= state.context.threshold}
        if enough == stay:
            return stay
        stay = enough


def _lonely(state: ServerState, owners: Collection[int], among: Collection[int]) -> list[int]:
    """Owners whose secrets fewer than threshold of those can give."""
    threshold = state.context.threshold
    return [owner for owner in sorted(owners) if _count(state, owner, among) < threshold]


def _short(state: ServerState, members: Collection[int], what: str) -> Aborted | None:
    if len(members) >= state.context.min_survivors:
        return None
    return Aborted(
        reason=Reason.TOO_FEW_SURVIVORS,
        detail=f"{len(members)} clients {what} and have enough neighbours, the floor is "
        f"{state.context.min_survivors}",
    )
