# SPDX-License-Identifier: Apache-2.0
"""What server and clients say to each other in a secure sum, and its one encoding as bytes.

    server                                        client
    Announcement   context                   0    Advertisement  two public keys, signed
    PeerKeys       signed keys of neighbours 1    SealedShares   shares of its two secrets, sealed
    PeerShares     what they sealed for it   2    MaskedInput    its vector under masks
    Survivors      whose vectors came        3    Consent        a signature of that list
    Evidence       neighbours' signatures    4    Reveal         one share of each neighbour

Every message is

    4   magic FLSA
    1   version
    1   kind
    32  digest of the context (see context.py)
    …   fields, little-endian; lists in ascending order of clients, each once

and ends where its fields end. Clients are named by their place in the context's list of names. Who
sends a message is known from the connection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from aggregation.errors import SecureMessageError
from aggregation.secure_aggregation._bytes import Reader, Writer
from aggregation.secure_aggregation.context import HASH_BYTES, Context
from aggregation.secure_aggregation.graph import MAX_CLIENTS
from aggregation.secure_aggregation.keys import KEY_BYTES, TAG_BYTES
from aggregation.secure_aggregation.shamir import PRIME, SHARE_BYTES

MAGIC: Final = b"FLSA"
VERSION: Final = 1
MAX_SIGNATURE_BYTES: Final = 512
SEALED_BYTES: Final = 2 * SHARE_BYTES + TAG_BYTES
HEADER_BYTES: Final = len(MAGIC) + 2 + HASH_BYTES
MAX_SMALL_BYTES: Final = 64 * 1024 * 1024
"""Of any message but a masked input: signed keys of all clients that there can be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """Stage 0, to every participant."""

    context: Context

    @property
    def attempt(self) -> bytes:
        return self.context.digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Advertisement:
    """Stage 0: keys for this attempt; the signature is of `keys_statement`."""

    attempt: bytes
    sealing_key: bytes
    mask_key: bytes
    signature: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerKey:
    """One neighbour's advertisement as it came, with the digest that it was made for."""

    peer: int
    advertisement: Advertisement


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerKeys:
    """Stage 1: of those neighbours that sent theirs."""

    attempt: bytes
    keys: tuple[PeerKey, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedShares:
    """Stage 1: for each neighbour a share of the mask key and one of the seed, sealed."""

    attempt: bytes
    commitment: bytes  # to the seed, see keys.py
    sealed: tuple[tuple[int, bytes], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerShares:
    """Stage 2: what each neighbour sealed for the receiver."""

    attempt: bytes
    sealed: tuple[tuple[int, bytes], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedInput:
    """Stage 2: the masked vector, packed."""

    attempt: bytes
    payload: bytes | memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class Survivors:
    """Stage 3: all whose masked vectors came, of the whole attempt."""

    attempt: bytes
    members: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Consent:
    """Stage 3: a signature of `survivors_statement`."""

    attempt: bytes
    signature: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Stage 4: the list again, and neighbours' signatures of it."""

    attempt: bytes
    members: tuple[int, ...]
    signatures: tuple[tuple[int, bytes], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reveal:
    """Stage 4: shares by owner, of seeds of those who survived and mask keys of those who did
    not."""

    attempt: bytes
    seeds: tuple[tuple[int, int], ...]
    mask_keys: tuple[tuple[int, int], ...]


Message = (
    Announcement
    | Advertisement
    | PeerKeys
    | SealedShares
    | PeerShares
    | MaskedInput
    | Survivors
    | Consent
    | Evidence
    | Reveal
)
_KINDS: Final[tuple[type[Message], ...]] = (
    Announcement,
    Advertisement,
    PeerKeys,
    SealedShares,
    PeerShares,
    MaskedInput,
    Survivors,
    Consent,
    Evidence,
    Reveal,
)


def keys_statement(attempt: bytes, name: str, sealing_key: bytes, mask_key: bytes) -> bytes:
    """What a client signs in stage 0."""
    raw = name.encode()
    return b"fedloom secure sum keys\0" + b"".join(
        (attempt, len(raw).to_bytes(2, "big"), raw, sealing_key, mask_key)
    )


def survivors_statement(attempt: bytes, members: Sequence[int]) -> bytes:
    """What a client signs in stage 3."""
    return b"fedloom secure sum survivors\0" + attempt + _members(Writer(), members).done()


def encode(message: Message) -> bytes:
    """The bytes that travel."""
    out = Writer().raw(MAGIC).u8(VERSION).u8(_KINDS.index(type(message))).raw(message.attempt)
    match message:
        case Announcement():
            out.raw(message.context.to_bytes())
        case Advertisement():
            _advertisement(out, message)
        case PeerKeys():
            out.u32(len(message.keys))
            for key in message.keys:
                out.u32(key.peer).raw(key.advertisement.attempt)
                _advertisement(out, key.advertisement)
        case SealedShares():
            _sealed(out.raw(message.commitment), message.sealed)
        case PeerShares():
            _sealed(out, message.sealed)
        case MaskedInput():
            out.long(bytes(message.payload))
        case Survivors():
            _members(out, message.members)
        case Consent():
            out.short(message.signature)
        case Evidence():
            _members(out, message.members).u32(len(message.signatures))
            for peer, signature in message.signatures:
                out.u32(peer).short(signature)
        case Reveal():
            for shares in (message.seeds, message.mask_keys):
                out.u32(len(shares))
                for owner, share in shares:
                    out.u32(owner).raw(share.to_bytes(SHARE_BYTES, "little"))
    return out.done()


def decode(blob: bytes | memoryview, *, max_bytes: int = MAX_SMALL_BYTES) -> Message:
    """The inverse of `encode`; the payload of a masked input is a view of `blob`.

    Raises: SecureMessageError for bytes that `encode` does not write.
    Cost: linear in the blob; nothing is allocated from a length that it claims.
    """
    if len(blob) > max_bytes:
        raise SecureMessageError(f"message: expected at most {max_bytes} bytes, found {len(blob)}")
    reader = Reader(blob)
    if reader.raw(len(MAGIC)) != MAGIC:
        raise SecureMessageError(f"message: expected it to start {MAGIC!r}")
    if (version := reader.u8()) != VERSION:
        raise SecureMessageError(
            f"message: expected version {VERSION}, found {version}; "
            "both sides need releases that share a version"
        )
    if (kind := reader.u8()) >= len(_KINDS):
        raise SecureMessageError(f"message: expected a kind below {len(_KINDS)}, found {kind}")
    attempt = reader.raw(HASH_BYTES)
    message = _READERS[_KINDS[kind]](reader, attempt)
    reader.end()
    return message


def masked_input_bytes(payload_bytes: int) -> int:
    """Length of a MaskedInput with a payload of so many bytes."""
    return HEADER_BYTES + 8 + payload_bytes


def _advertisement(out: Writer, message: Advertisement) -> None:
    out.raw(message.sealing_key).raw(message.mask_key).short(message.signature)


def _read_advertisement(reader: Reader, attempt: bytes) -> Advertisement:
    return Advertisement(
        attempt=attempt,
        sealing_key=reader.raw(KEY_BYTES),
        mask_key=reader.raw(KEY_BYTES),
        signature=reader.short(MAX_SIGNATURE_BYTES),
    )


def _read_announcement(reader: Reader, attempt: bytes) -> Announcement:
    context = Context.from_bytes(reader.rest())
    if context.digest() != attempt:
        raise SecureMessageError("announcement: its digest is not that of its context")
    return Announcement(context=context)


def _read_peer_keys(reader: Reader, attempt: bytes) -> PeerKeys:
    keys = []
    for _ in range(reader.count(MAX_CLIENTS, each=4 + HASH_BYTES + 2 * KEY_BYTES + 2)):
        peer, own = reader.u32(), reader.raw(HASH_BYTES)
        keys.append(PeerKey(peer=peer, advertisement=_read_advertisement(reader, own)))
    _require_ascending(key.peer for key in keys)
    return PeerKeys(attempt=attempt, keys=tuple(keys))


def _sealed(out: Writer, sealed: Sequence[tuple[int, bytes]]) -> None:
    out.u32(len(sealed))
    for peer, box in sealed:
        out.u32(peer).raw(box)


def _read_sealed(reader: Reader) -> tuple[tuple[int, bytes], ...]:
    count = reader.count(MAX_CLIENTS, each=4 + SEALED_BYTES)
    sealed = tuple((reader.u32(), reader.raw(SEALED_BYTES)) for _ in range(count))
    _require_ascending(peer for peer, _ in sealed)
    return sealed


def _members(out: Writer, members: Sequence[int]) -> Writer:
    out.u32(len(members))
    for member in members:
        out.u32(member)
    return out


def _read_members(reader: Reader) -> tuple[int, ...]:
    members = tuple(reader.u32() for _ in range(reader.count(MAX_CLIENTS, each=4)))
    _require_ascending(members)
    return members


def _read_evidence(reader: Reader, attempt: bytes) -> Evidence:
    members = _read_members(reader)
    count = reader.count(MAX_CLIENTS, each=6)
    signatures = tuple((reader.u32(), reader.short(MAX_SIGNATURE_BYTES)) for _ in range(count))
    _require_ascending(peer for peer, _ in signatures)
    return Evidence(attempt=attempt, members=members, signatures=signatures)


def _read_shares(reader: Reader) -> tuple[tuple[int, int], ...]:
    shares = []
    for _ in range(reader.count(MAX_CLIENTS, each=4 + SHARE_BYTES)):
        owner, share = reader.u32(), int.from_bytes(reader.view(SHARE_BYTES), "little")
        if share >= PRIME:
            raise SecureMessageError("share: expected a number below the prime, found a larger one")
        shares.append((owner, share))
    _require_ascending(owner for owner, _ in shares)
    return tuple(shares)


def _require_ascending(places: Iterable[int]) -> None:
    last = -1
    for place in places:
        if not last < place < MAX_CLIENTS:
            raise SecureMessageError("message: expected clients in ascending order, each once")
        last = place


_READERS: Final[dict[type[Message], Callable[[Reader, bytes], Message]]] = {
    Announcement: _read_announcement,
    Advertisement: _read_advertisement,
    PeerKeys: _read_peer_keys,
    SealedShares: lambda reader, attempt: SealedShares(
        attempt=attempt, commitment=reader.raw(HASH_BYTES), sealed=_read_sealed(reader)
    ),
    PeerShares: lambda reader, attempt: PeerShares(attempt=attempt, sealed=_read_sealed(reader)),
    MaskedInput: lambda reader, attempt: MaskedInput(attempt=attempt, payload=reader.long()),
    Survivors: lambda reader, attempt: Survivors(attempt=attempt, members=_read_members(reader)),
    Consent: lambda reader, attempt: Consent(
        attempt=attempt, signature=reader.short(MAX_SIGNATURE_BYTES)
    ),
    Evidence: _read_evidence,
    Reveal: lambda reader, attempt: Reveal(
        attempt=attempt, seeds=_read_shares(reader), mask_keys=_read_shares(reader)
    ),
}
