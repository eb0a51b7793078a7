# SPDX-License-Identifier: Apache-2.0
"""A client's state as bytes: a device's process may end between any two messages.

    4   magic FLSC
    1   version
    1   which state
    32  digest of the context; for those that still need it, the context itself
    …   fields, little-endian; the secrets as they are
    32  SHA-256 of all before it, which finds accidents: whoever can write the file has the secrets

The caller keeps these bytes as it keeps the device's key, and replaces them before it lets an
answer go.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Final

from aggregation.errors import SecureMessageError
from aggregation.secure_aggregation._bytes import Reader, Writer
from aggregation.secure_aggregation.client_states import (
    Advertised,
    ClientState,
    Consented,
    Ended,
    Held,
    Masked,
    PeerPublic,
    Revealed,
    Shared,
)
from aggregation.secure_aggregation.context import HASH_BYTES, MAX_CONTEXT_BYTES, Context
from aggregation.secure_aggregation.graph import MAX_CLIENTS
from aggregation.secure_aggregation.keys import KEY_BYTES, KeyPair, public_of
from aggregation.secure_aggregation.outcomes import Reason
from aggregation.secure_aggregation.shamir import PRIME, SECRET_BYTES, SHARE_BYTES

MAGIC: Final = b"FLSC"
VERSION: Final = 1
_KINDS: Final[tuple[type[ClientState], ...]] = (
    Advertised,
    Shared,
    Masked,
    Consented,
    Revealed,
    Ended,
)
_REASONS: Final = tuple(Reason)


def to_bytes(state: ClientState) -> bytes:
    """The state with its secrets."""
    out = Writer().raw(MAGIC).u8(VERSION).u8(_KINDS.index(type(state)))
    if isinstance(state, Revealed | Ended):
        out.raw(state.attempt)
    else:
        out.raw(state.context.digest()).long(state.context.to_bytes())
    match state:
        case Advertised():
            out.raw(state.sealing.secret).raw(state.mask.secret)
            out.raw(state.request).long(state.reply)
        case Shared():
            out.raw(state.sealing_secret).raw(state.mask_secret).raw(state.seed)
            out.u32(len(state.peers))
            for peer, public in state.peers.items():
                out.u32(peer).raw(public.sealing).raw(public.mask)
            out.raw(state.request).long(state.reply)
        case Masked():
            out.raw(state.mask_secret).raw(state.seed)
            out.u32(len(state.peers))
            for peer, mask in state.peers.items():
                out.u32(peer).raw(mask)
            _held(out, state.held)
            out.raw(state.request).raw(state.sent)
        case Consented():
            _places(_places(out, state.peers), state.members)
            _held(out, state.held)
            out.raw(state.request).long(state.reply)
        case Revealed():
            out.raw(state.request).long(state.reply)
        case Ended():
            out.u8(_REASONS.index(state.reason))
    raw = out.done()
    return raw + hashlib.sha256(raw).digest()


def from_bytes(blob: bytes | memoryview) -> ClientState:
    """The inverse. Raises: SecureMessageError for bytes that `to_bytes` does not write."""
    view = memoryview(blob).cast("B")
    if len(view) < HASH_BYTES:
        raise SecureMessageError(f"state: expected at least {HASH_BYTES} bytes, found {len(view)}")
    body = view[:-HASH_BYTES]
    if hashlib.sha256(body).digest() != bytes(view[-HASH_BYTES:]):
        raise SecureMessageError("state: its bytes changed where they were kept")
    reader = Reader(body)
    if reader.raw(len(MAGIC)) != MAGIC or reader.u8() != VERSION:
        raise SecureMessageError(f"state: expected {MAGIC!r} of version {VERSION}")
    if (kind := reader.u8()) >= len(_KINDS):
        raise SecureMessageError(f"state: expected a kind below {len(_KINDS)}, found {kind}")
    attempt = reader.raw(HASH_BYTES)
    state = _state(_KINDS[kind], attempt, reader)
    reader.end()
    return state


def _state(kind: type[ClientState], attempt: bytes, reader: Reader) -> ClientState:
    if kind is Revealed:
        return Revealed(attempt=attempt, request=reader.raw(HASH_BYTES), reply=_reply(reader))
    if kind is Ended:
        if (code := reader.u8()) >= len(_REASONS):
            raise SecureMessageError(f"state: reason {code} is not known")
        return Ended(attempt=attempt, reason=_REASONS[code])
    context = _context(attempt, reader)
    if kind is Advertised:
        return Advertised(
            context=context,
            sealing=_pair(reader),
            mask=_pair(reader),
            request=reader.raw(HASH_BYTES),
            reply=_reply(reader),
        )
    if kind is Shared:
        return Shared(
            context=context,
            sealing_secret=reader.raw(KEY_BYTES),
            mask_secret=reader.raw(KEY_BYTES),
            seed=reader.raw(SECRET_BYTES),
            peers={
                peer: PeerPublic(reader.raw(KEY_BYTES), reader.raw(KEY_BYTES))
                for peer in _each(reader, context, 4 + 2 * KEY_BYTES)
            },
            request=reader.raw(HASH_BYTES),
            reply=_reply(reader),
        )
    if kind is Masked:
        return Masked(
            context=context,
            mask_secret=reader.raw(KEY_BYTES),
            seed=reader.raw(SECRET_BYTES),
            peers={peer: reader.raw(KEY_BYTES) for peer in _each(reader, context, 4 + KEY_BYTES)},
            held=_read_held(reader, context),
            request=reader.raw(HASH_BYTES),
            sent=reader.raw(HASH_BYTES),
        )
    return Consented(
        context=context,
        peers=tuple(_each(reader, context, 4)),
        members=tuple(_each(reader, context, 4)),
        held=_read_held(reader, context),
        request=reader.raw(HASH_BYTES),
        reply=_reply(reader),
    )


def _context(attempt: bytes, reader: Reader) -> Context:
    raw = reader.long()
    if len(raw) > MAX_CONTEXT_BYTES:
        raise SecureMessageError(f"state: a context of {len(raw)} bytes is too long")
    context = Context.from_bytes(raw)
    if context.digest() != attempt:
        raise SecureMessageError("state: its digest is not that of its context")
    return context


def _pair(reader: Reader) -> KeyPair:
    secret = reader.raw(KEY_BYTES)
    return KeyPair(secret=secret, public=public_of(secret))


def _reply(reader: Reader) -> bytes:
    return bytes(reader.long())


def _held(out: Writer, held: Mapping[int, Held]) -> None:
    out.u32(len(held))
    for peer, shares in held.items():
        out.u32(peer)
        for share in shares:
            out.raw(share.to_bytes(SHARE_BYTES, "little"))


def _read_held(reader: Reader, context: Context) -> dict[int, Held]:
    held = {}
    for peer in _each(reader, context, 4 + 2 * SHARE_BYTES):
        mask_key, seed = (int.from_bytes(reader.view(SHARE_BYTES), "little") for _ in range(2))
        if max(mask_key, seed) >= PRIME:
            raise SecureMessageError("state: a share is not below the prime")
        held[peer] = Held(mask_key, seed)
    return held


def _places(out: Writer, places: tuple[int, ...]) -> Writer:
    out.u32(len(places))
    for place in places:
        out.u32(place)
    return out


def _each(reader: Reader, context: Context, size: int) -> Iterator[int]:
    """Places of a list, ascending; what belongs to each is read before the next."""
    last = -1
    for _ in range(reader.count(MAX_CLIENTS, each=size)):
        place = reader.u32()
        if not last < place < len(context.names):
            raise SecureMessageError("state: expected clients in ascending order, each once")
        last = place
        yield place
