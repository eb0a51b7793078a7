# SPDX-License-Identifier: Apache-2.0
"""The server of a secure sum: it gathers the answers of one stage after another, and adds up.

    open_attempt ─→ state, announcements     receive(state, name, answer) ─→ state, fault or None
    close_stage(state) ─→ state, messages of the next stage by name, or Aborted, or SecureSum

The caller sends messages and decides when a stage has waited long enough. What a client sends that
cannot be taken drops that client and nobody else; a message that comes again is no fault. Masked
vectors are added to one running sum as they come and are not kept.

With survivors U and the dropped D (who shared their secrets, and sent no vector), modulo 2ᵏ

    Σ_{u∈U} x_u = Σ_{u∈U} y_u - Σ_{u∈U} PRG(b_u) - Σ_{u∈U, v∈D∩N(u)} ±PRG(s_uv),  + where v > u

*Source* Bonawitz et al., CCS 2017; Bell et al., CCS 2020. *Differs from source*: mask keys that are
put together are checked against the public key that was advertised, seeds against the commitment;
if shares of a secret do not open it, others of its holders are tried, which gets by without one
false holder where there is one to spare.

*Cost* for n clients of degree k: the sum is 2 or 4 bytes a value, copied once for each vector that
comes; in the end n + |D|·k masks and n threshold-sized reconstructions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Final

import numpy as np

from aggregation.errors import SecureMessageError, SecureSumError
from aggregation.secure_aggregation import keys, shamir
from aggregation.secure_aggregation.context import Context
from aggregation.secure_aggregation.graph import neighbours
from aggregation.secure_aggregation.keys import Verifier
from aggregation.secure_aggregation.masks import add_mask, reduce, subtract_mask, word_type
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
from aggregation.secure_aggregation.packing import packed_bytes, unpack


class Stage(IntEnum):
    """Which answer is awaited."""

    KEYS = 0
    SHARES = 1
    VECTORS = 2
    CONSENTS = 3
    REVEALS = 4
    OVER = 5


_AWAITED: Final[dict[Stage, type]] = {
    Stage.KEYS: Advertisement,
    Stage.SHARES: SealedShares,
    Stage.VECTORS: MaskedInput,
    Stage.CONSENTS: Consent,
    Stage.REVEALS: Reveal,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerState:
    """All that the server knows of an attempt. Clients are places in `context.names`."""

    context: Context
    attempt: bytes
    edges: tuple[tuple[int, ...], ...] = field(repr=False)
    stage: Stage
    asked: frozenset[int]  # whom this stage's message went to
    answered: Mapping[int, bytes]  # SHA-256 of this stage's answers
    advertised: Mapping[int, Advertisement] = field(repr=False)
    sealed: Mapping[int, SealedShares] = field(repr=False)
    holders: frozenset[int] = frozenset()  # those whose shares were passed on
    commitments: Mapping[int, bytes] = field(default_factory=dict, repr=False)  # to their seeds
    total: np.ndarray | None = field(default=None, repr=False)
    survivors: tuple[int, ...] = ()
    consents: Mapping[int, Consent] = field(default_factory=dict, repr=False)
    reveals: Mapping[int, Reveal] = field(default_factory=dict, repr=False)
    dropped: Mapping[int, Fault] = field(default_factory=dict)

    def waiting_for(self) -> tuple[str, ...]:
        """Names of those who have yet to answer this stage; nobody after the end."""
        if self.stage is Stage.OVER:
            return ()
        open_ = self.asked - set(self.answered) - set(self.dropped)
        return tuple(self.context.names[place] for place in sorted(open_))


@dataclass(frozen=True, slots=True, kw_only=True)
class SecureSum:
    """The sum modulo 2^bits of the vectors of `members`, uint16 or uint32 [d]."""

    values: np.ndarray
    members: tuple[str, ...]


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
    except SecureMessageError as error:
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
            return replace(state, stage=Stage.OVER), _opened(state)
    raise SecureSumError("secure sum: this attempt is over; open another")


def _close_keys(state: ServerState) -> tuple[ServerState, Outgoing | Aborted]:
    stay = _with_enough(state, _answered(state))
    if short := _short(state, stay, "sent keys"):
        return replace(state, stage=Stage.OVER), short
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
        return replace(state, stage=Stage.OVER), short
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
        return replace(state, stage=Stage.OVER), short
    # all that shared: the mask key of whoever is lost has to come from threshold neighbours too
    if lonely := _lonely(state, state.holders, members):
        return _lost(state, lonely, "sent vectors")
    survivors = tuple(sorted(members))
    message = encode(Survivors(attempt=state.attempt, members=survivors))
    messages = dict.fromkeys(survivors, message)
    return _next(replace(state, survivors=survivors), Stage.CONSENTS, messages)


def _close_consents(state: ServerState) -> tuple[ServerState, Outgoing | Aborted]:
    signed = _answered(state)
    # a client wants the signatures of threshold neighbours, and answers only then
    served = {place for place in signed if _count(state, place, signed) >= state.context.threshold}
    if lonely := _lonely(state, state.holders, served):
        return _lost(state, lonely, "signed the list")
    messages = {}
    for place in sorted(served):
        signatures = tuple(
            (peer, state.consents[peer].signature) for peer in state.edges[place] if peer in signed
        )
        messages[place] = encode(
            Evidence(attempt=state.attempt, members=state.survivors, signatures=signatures)
        )
    return _next(state, Stage.REVEALS, messages)


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


def _lost(state: ServerState, lonely: Sequence[int], what: str) -> tuple[ServerState, Aborted]:
    names = tuple(state.context.names[place] for place in lonely)
    detail = (
        f"of {len(lonely)} clients fewer than {state.context.threshold} neighbours {what}; "
        "their masks cannot be removed"
    )
    aborted = Aborted(reason=Reason.TOO_FEW_PEERS, detail=detail, names=names)
    return replace(state, stage=Stage.OVER), aborted


def _opened(state: ServerState) -> SecureSum | Aborted:
    """The running sum without its masks."""
    context, attempt, names = state.context, state.attempt, state.context.names
    secrets, false = _secrets(state)
    if false is not None:
        return false
    kind = word_type(context.task.bits)
    total = np.zeros(context.task.values, kind) if state.total is None else state.total.copy()
    alive = set(state.survivors)
    for owner, secret in secrets.items():
        if owner in alive:
            seed_key = keys.self_mask_key(secret, attempt=attempt, name=names[owner])
            subtract_mask(total, seed_key)
            continue
        agreement = keys.agreements(secret)
        for peer in state.edges[owner]:
            if peer in alive:
                agreed = agreement(state.advertised[peer].mask_key)
                key = keys.pair_mask_key(
                    agreed, attempt=attempt, one=names[owner], other=names[peer]
                )
                # the lower place has added it
                (subtract_mask if peer < owner else add_mask)(total, key)
    reduce(total, context.task.bits)
    return SecureSum(values=total, members=tuple(names[place] for place in state.survivors))


def _secrets(state: ServerState) -> tuple[dict[int, bytes], Aborted | None]:
    """Seeds of survivors and mask keys of the lost, by place, each checked."""
    alive, threshold = set(state.survivors), state.context.threshold
    shares: dict[int, dict[int, int]] = {owner: {} for owner in sorted(state.holders)}
    for holder, reveal in sorted(state.reveals.items()):
        if holder not in state.dropped:
            for owner, share in (*reveal.seeds, *reveal.mask_keys):
                shares[owner][holder] = share
    if lonely := [owner for owner, found in shares.items() if len(found) < threshold]:
        return {}, _lost(state, lonely, "gave shares")[1]
    weights: dict[tuple[int, ...], tuple[int, ...]] = {}
    secrets: dict[int, bytes] = {}
    for owner, found in shares.items():
        secret = None
        holders = list(found)
        # each turn leaves out others; without any to spare there is one way only
        for turn in range(len(holders) if len(holders) > threshold else 1):
            used = tuple((holders[turn:] + holders[:turn])[:threshold])
            if used not in weights:
                weights[used] = shamir.coefficients([holder + 1 for holder in used])
            number = shamir.combine(weights[used], [found[holder] for holder in used])
            secret = _checked(state, owner, number, alive=owner in alive)
            if secret is not None:
                break
        if secret is None:
            name = state.context.names[owner]
            return {}, Aborted(
                reason=Reason.FALSE_SHARES,
                detail=f"the shares of {name} do not give what it committed to",
                names=(name,),
            )
        secrets[owner] = secret
    return secrets, None


def _checked(state: ServerState, owner: int, number: int, *, alive: bool) -> bytes | None:
    """The secret, if it is the one that its owner has committed to."""
    if number >> (8 * shamir.SECRET_BYTES):
        return None
    secret = number.to_bytes(shamir.SECRET_BYTES, "little")
    if not alive:
        return secret if keys.public_of(secret) == state.advertised[owner].mask_key else None
    name = state.context.names[owner]
    expected = keys.commitment(secret, attempt=state.attempt, name=name)
    return secret if expected == state.commitments[owner] else None
