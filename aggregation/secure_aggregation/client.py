# SPDX-License-Identifier: Apache-2.0
"""A client of a secure sum: a state, a message, the next state and an answer.

    None ─Announcement→ Advertised ─PeerKeys→ Shared ─PeerShares→ Masked
         ─Survivors→ Consented ─Evidence→ Revealed           any of them ─→ Ended

With neighbours N(u), secrets s_u (mask key) and b_u (seed), vector x_u, all modulo 2ᵏ:

    y_u = x_u + PRG(b_u) + Σ_{v ∈ N(u), v > u} PRG(s_uv) - Σ_{v ∈ N(u), v < u} PRG(s_uv)

*Source* Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning",
CCS 2017, the variant against an active server, with the consistency round; the graph is that of
Bell et al., CCS 2020 (see graph.py).
*Differs from source*: the list that a client signs is that of all survivors, not of its
neighbourhood, so that one signature ties a neighbourhood to the whole sum; it wants signatures of
threshold neighbours that survived. The seed is committed to, so that false shares of it are seen.
The consent also ends the use of the masking secrets, which are dropped then, before the last stage.

What a client never does, whatever it is told: give two different kinds of share of one peer, sign
two lists, mask two vectors, or answer for a list that it is not on. States are frozen: whoever
keeps them has to have the new one stored before the answer leaves, and never to go back to an
older one. `to_bytes` and `from_bytes` are for that; their bytes hold secrets and belong where the
device's own key does.

A message that comes again gets the same answer. One of another attempt or stage is refused and
changes nothing; one that is wrong in its own stage, or that says other things than the one before
it, ends the attempt for this client and drops its secrets. Python cannot wipe memory: dropped means
that nothing refers to them any more.

*Cost* one X25519 agreement and two shares for each neighbour, one mask of d words for each and one
of its own; beside the vector a copy of it, its packed bytes and 3 MiB.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from aggregation.errors import SecureMessageError, SecureSumError
from aggregation.packing import pack, word_type
from aggregation.secure_aggregation import keys, shamir
from aggregation.secure_aggregation.client_states import (
    Advertised,
    ClientState,
    Consented,
    Device,
    Ended,
    Held,
    Masked,
    PeerPublic,
    Revealed,
    Shared,
)
from aggregation.secure_aggregation.context import Context, Task
from aggregation.secure_aggregation.graph import neighbours_of, shape
from aggregation.secure_aggregation.masks import add_mask, reduce, subtract_mask
from aggregation.secure_aggregation.messages import (
    MAX_SIGNATURE_BYTES,
    Advertisement,
    Announcement,
    Consent,
    Evidence,
    MaskedInput,
    Message,
    PeerKeys,
    PeerShares,
    Reveal,
    SealedShares,
    Survivors,
    decode,
    encode,
    keys_statement,
    survivors_statement,
)
from aggregation.secure_aggregation.outcomes import Reason, Refusal


class _RefusedError(Exception):
    """Inside this module only: the attempt is over for this client."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


def advance(
    state: ClientState | None,
    message: bytes | memoryview,
    device: Device,
    values: np.ndarray | None = None,
) -> tuple[ClientState | None, bytes | Refusal]:
    """The state after a message from the server, and the answer.

    `state` is None before the attempt. `values`, the vector to be summed, uint16 or uint32 [d]
    below 2ᵏ, is needed for `PeerShares` alone (see `wants_values`), and is not written to.

    Raises: SecureSumError for values that are missing or do not fit the task; nothing else, and
    for nothing that a server can send.
    """
    try:
        parsed = decode(message)
    except SecureMessageError as error:
        return state, Refusal(reason=Reason.MALFORMED, detail=str(error), final=False)
    if state is not None:
        own = state.attempt if isinstance(state, Revealed | Ended) else state.context.digest()
        if parsed.attempt != own:
            return state, _aside(Reason.OTHER_ATTEMPT, "a message of another attempt")
        if isinstance(state, Ended):
            return state, _aside(Reason.ENDED, f"this client has left the attempt: {state.reason}")
    request = hashlib.sha256(message).digest()
    try:
        return _advance(state, parsed, request, device, values)
    except _RefusedError as refused:
        ended = Ended(attempt=parsed.attempt, reason=refused.reason)
        return ended, Refusal(reason=refused.reason, detail=refused.detail, final=True)


def wants_values(state: ClientState | None, message: bytes | memoryview) -> bool:
    """Whether `advance` needs the vector for this message."""
    try:
        return isinstance(state, Shared | Masked) and isinstance(decode(message), PeerShares)
    except SecureMessageError:
        return False


def _advance(
    state: ClientState | None,
    message: Message,
    request: bytes,
    device: Device,
    values: np.ndarray | None,
) -> tuple[ClientState | None, bytes | Refusal]:
    match state, message:
        case None, Announcement():
            return _advertise(message.context, request, device)
        case Advertised(), PeerKeys():
            return _share(state, message, request, device)
        case Shared(), PeerShares():
            return _mask(state, message, request, device, values)
        case Masked(), Survivors():
            return _consent(state, message, request, device)
        case Consented(), Evidence():
            return _reveal(state, message, request, device)
    if state is None or isinstance(state, Ended) or not isinstance(message, _LED_TO[type(state)]):
        kind = type(message).__name__
        return state, _aside(Reason.OUT_OF_ORDER, f"{kind} is not what this stage waits for")
    if request != state.request:
        kind = type(message).__name__
        raise _RefusedError(Reason.CONTRADICTION, f"{kind} came before and said other things")
    if isinstance(state, Masked):
        return state, _masked_again(state, device, values)
    return state, state.reply


_LED_TO: Final[dict[type, type]] = {
    Advertised: Announcement,
    Shared: PeerKeys,
    Masked: PeerShares,
    Consented: Survivors,
    Revealed: Evidence,
}


def _aside(reason: Reason, detail: str) -> Refusal:
    return Refusal(reason=reason, detail=detail, final=False)


def _advertise(context: Context, request: bytes, device: Device) -> tuple[Advertised, bytes]:
    _require_acceptable(context, device)
    attempt = context.digest()
    sealing, mask = keys.new_pair(), keys.new_pair()
    statement = keys_statement(attempt, device.name, sealing.public, mask.public)
    reply = Advertisement(
        attempt=attempt,
        sealing_key=sealing.public,
        mask_key=mask.public,
        signature=_signed(statement, device),
    )
    raw = encode(reply)
    return (
        Advertised(context=context, sealing=sealing, mask=mask, request=request, reply=raw),
        raw,
    )


def _require_acceptable(context: Context, device: Device) -> None:
    """The server's announcement against what the device knows by itself."""
    task, terms, count = device.task, device.terms, len(context.names)
    for name in Task.__dataclass_fields__:
        if getattr(context.task, name) != getattr(task, name):
            raise _RefusedError(Reason.WRONG_TASK, f"{name} is not that of the plan that was sent")
    if device.name not in context.names:
        raise _RefusedError(Reason.UNKNOWN_CLIENT, "this client is not among the participants")
    if 2 * context.threshold <= context.degree:
        raise _RefusedError(
            Reason.WEAK_TERMS,
            f"a threshold of {context.threshold} is half of {context.degree} holders or less: "
            "both secrets of a client could be put together",
        )
    try:
        needed = shape(count, corrupt=terms.corrupt, dropouts=terms.dropouts)
    except SecureSumError as error:
        raise _RefusedError(Reason.WEAK_TERMS, str(error)) from None
    if (context.degree, context.threshold) != (needed.degree, needed.threshold):
        raise _RefusedError(
            Reason.WEAK_TERMS,
            f"expected {needed.degree} neighbours and a threshold of {needed.threshold}, as the "
            f"job's terms give, found {context.degree} and {context.threshold}",
        )
    if context.min_survivors != terms.min_survivors:
        raise _RefusedError(
            Reason.WEAK_TERMS,
            f"expected a floor of {terms.min_survivors} survivors, found {context.min_survivors}",
        )


def _share(
    state: Advertised, message: PeerKeys, request: bytes, device: Device
) -> tuple[Shared, bytes]:
    context, attempt = state.context, message.attempt
    _, allowed = _own_place(context, device)
    peers: dict[int, PeerPublic] = {}
    sealed: dict[int, bytes] = {}
    for key in message.keys:
        found = key.advertisement
        if key.peer not in allowed:
            raise _RefusedError(Reason.UNKNOWN_CLIENT, f"client {key.peer} is no neighbour")
        name = context.names[key.peer]
        if found.attempt != attempt:
            raise _RefusedError(
                Reason.OTHER_PLAN, f"{name} signed its keys for another plan or list than ours"
            )
        statement = keys_statement(attempt, name, found.sealing_key, found.mask_key)
        if not device.verify(name, statement, found.signature):
            raise _RefusedError(Reason.FORGED_KEYS, f"the keys of {name} are not signed by it")
        peers[key.peer] = PeerPublic(found.sealing_key, found.mask_key)
    _require_peers(len(peers), context, "sent keys")
    seed = secrets.token_bytes(shamir.SECRET_BYTES)
    shares = [
        shamir.share(
            int.from_bytes(secret, "little"),
            threshold=context.threshold,
            holders=[peer + 1 for peer in peers],
        )
        for secret in (state.mask.secret, seed)
    ]
    agreed = _agreements(state.sealing.secret)
    for peer, public in peers.items():
        plain = b"".join(each[peer + 1].to_bytes(shamir.SHARE_BYTES, "little") for each in shares)
        sealed[peer] = keys.seal(
            plain,
            agreed(public.sealing, context.names[peer]),
            attempt=attempt,
            sender=device.name,
            receiver=context.names[peer],
        )
    reply = encode(
        SealedShares(
            attempt=attempt,
            commitment=keys.commitment(seed, attempt=attempt, name=device.name),
            sealed=tuple(sealed.items()),
        )
    )
    after = Shared(
        context=context,
        sealing_secret=state.sealing.secret,
        mask_secret=state.mask.secret,
        seed=seed,
        peers=peers,
        request=request,
        reply=reply,
    )
    return after, reply


def _mask(
    state: Shared,
    message: PeerShares,
    request: bytes,
    device: Device,
    values: np.ndarray | None,
) -> tuple[Masked, bytes]:
    context, attempt = state.context, message.attempt
    vector = _require_values(values, context.task)
    kept: dict[int, bytes] = {}
    held: dict[int, Held] = {}
    agreed = _agreements(state.sealing_secret)
    for peer, box in message.sealed:
        if peer not in state.peers:
            raise _RefusedError(
                Reason.UNKNOWN_CLIENT, f"shares of client {peer}, whose keys did not come"
            )
        public, name = state.peers[peer], context.names[peer]
        kept[peer] = public.mask
        secret = agreed(public.sealing, name)
        try:
            plain = keys.unseal(box, secret, attempt=attempt, sender=name, receiver=device.name)
        except SecureMessageError:
            continue  # that peer's fault or the server's; it is masked towards all the same
        half = shamir.SHARE_BYTES
        pair = Held(*(int.from_bytes(part, "little") for part in (plain[:half], plain[half:])))
        if max(pair) < shamir.PRIME:
            held[peer] = pair
    _require_peers(len(kept), context, "sent shares")
    payload = _masked(vector, context, device.name, state.mask_secret, state.seed, kept)
    after = Masked(
        context=context,
        mask_secret=state.mask_secret,
        seed=state.seed,
        peers=kept,
        held=held,
        request=request,
        sent=hashlib.sha256(payload).digest(),
    )
    return after, encode(MaskedInput(attempt=attempt, payload=payload))


def _masked_again(state: Masked, device: Device, values: np.ndarray | None) -> bytes | Refusal:
    """The same bytes for the same vector; of two vectors under the same masks the difference is
    plain to see."""
    context = state.context
    vector = _require_values(values, context.task)
    payload = _masked(vector, context, device.name, state.mask_secret, state.seed, state.peers)
    if hashlib.sha256(payload).digest() != state.sent:
        return _aside(Reason.CHANGED_VALUES, "the vector is not the one that was sent before")
    return encode(MaskedInput(attempt=context.digest(), payload=payload))


def _masked(
    vector: np.ndarray,
    context: Context,
    name: str,
    mask_secret: bytes,
    seed: bytes,
    peers: Mapping[int, bytes],
) -> bytes:
    attempt, own = context.digest(), context.names.index(name)
    total = vector.copy()
    add_mask(total, keys.self_mask_key(seed, attempt=attempt, name=name))
    agreed = _agreements(mask_secret)
    for peer, public in peers.items():
        other = context.names[peer]
        key = keys.pair_mask_key(agreed(public, other), attempt=attempt, one=name, other=other)
        (add_mask if own < peer else subtract_mask)(total, key)
    reduce(total, context.task.bits)
    return pack(total, context.task.bits)


def _consent(
    state: Masked, message: Survivors, request: bytes, device: Device
) -> tuple[Consented, bytes]:
    context, members = state.context, message.members
    own, _ = _own_place(context, device)
    if members and members[-1] >= len(context.names):
        raise _RefusedError(Reason.UNKNOWN_CLIENT, f"client {members[-1]} is no participant")
    if own not in members:
        raise _RefusedError(Reason.DECLARED_DEAD, "this client is not among the survivors")
    if len(members) < context.min_survivors:
        raise _RefusedError(
            Reason.TOO_FEW_SURVIVORS,
            f"{len(members)} survive, the job asks for {context.min_survivors}",
        )
    _require_peers(len(set(members) & set(state.peers)), context, "survive")
    reply = encode(
        Consent(
            attempt=message.attempt,
            signature=_signed(survivors_statement(message.attempt, members), device),
        )
    )
    after = Consented(
        context=context,
        peers=tuple(state.peers),
        held=state.held,
        members=members,
        request=request,
        reply=reply,
    )
    return after, reply


def _reveal(
    state: Consented, message: Evidence, request: bytes, device: Device
) -> tuple[Revealed, bytes]:
    context, attempt = state.context, message.attempt
    if message.members != state.members:
        raise _RefusedError(Reason.CONTRADICTION, "the list is not the one that was signed")
    statement = survivors_statement(attempt, state.members)
    surviving = set(state.members) & set(state.peers)
    for peer, signature in message.signatures:
        if peer not in surviving:
            raise _RefusedError(
                Reason.UNKNOWN_CLIENT, f"a signature of client {peer}, no surviving neighbour"
            )
        if not device.verify(context.names[peer], statement, signature):
            raise _RefusedError(
                Reason.FORGED_CONSENT, f"{context.names[peer]} did not sign this list"
            )
    _require_peers(len(message.signatures), context, "signed the list")
    reply = encode(
        Reveal(
            attempt=attempt,
            seeds=tuple((u, held.seed) for u, held in state.held.items() if u in surviving),
            mask_keys=tuple(
                (u, held.mask_key) for u, held in state.held.items() if u not in surviving
            ),
        )
    )
    return Revealed(attempt=attempt, request=request, reply=reply), reply


def _own_place(context: Context, device: Device) -> tuple[int, frozenset[int]]:
    """The client's place in the list, and its neighbours by the graph that it works out itself."""
    own = context.names.index(device.name)
    found = neighbours_of(own, context.names, context.seed, context.degree)
    return own, frozenset(found)


def _require_peers(count: int, context: Context, what: str) -> None:
    if count < context.threshold:
        raise _RefusedError(
            Reason.TOO_FEW_PEERS,
            f"{count} neighbours {what}, the threshold is {context.threshold}",
        )


def _require_values(values: np.ndarray | None, task: Task) -> np.ndarray:
    if values is None:
        raise SecureSumError("values: this message is answered with the vector, give it")
    expected = word_type(task.bits)
    if values.dtype != expected or values.shape != (task.values,):
        raise SecureSumError(
            f"values: expected {expected} [{task.values}], found {values.dtype} "
            f"{list(values.shape)}"
        )
    if int(values.max()) >> task.bits:
        raise SecureSumError(f"values: expected them below 2**{task.bits}, found {values.max()}")
    return values


def _agreements(secret: bytes) -> Callable[[bytes, str], bytes]:
    """What is agreed with a public key and its owner's name."""
    agreed = keys.agreements(secret)

    def with_peer(public: bytes, name: str) -> bytes:
        try:
            return agreed(public)
        except SecureSumError:
            raise _RefusedError(Reason.WEAK_KEY, f"a key of {name} agrees with everybody") from None

    return with_peer


def _signed(statement: bytes, device: Device) -> bytes:
    signature = device.sign(statement)
    if not 1 <= len(signature) <= MAX_SIGNATURE_BYTES:
        raise SecureSumError(
            f"signature: expected 1 to {MAX_SIGNATURE_BYTES} bytes of the device's signer, found "
            f"{len(signature)}"
        )
    return signature
