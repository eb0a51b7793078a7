# SPDX-License-Identifier: Apache-2.0
"""Secure sums in one process: clients that drop out where they are told to, and what the server can
make of all that it has heard.

A `Room` holds the clients of one attempt and writes down every message. Whoever plays the server
calls `tell`; `play` does it honestly, `simulations/secure_attacks.py` does not.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from aggregation.packing import unpack, word_type
from aggregation.secure_aggregation import client, keys, server, shamir
from aggregation.secure_aggregation.client_bytes import from_bytes, to_bytes
from aggregation.secure_aggregation.context import Context, Task, Terms, new_context
from aggregation.secure_aggregation.masks import add_mask, reduce, subtract_mask
from aggregation.secure_aggregation.messages import (
    Advertisement,
    MaskedInput,
    PeerShares,
    Reveal,
    SealedShares,
    decode,
)
from aggregation.secure_aggregation.outcomes import Aborted, Fault, Refusal
from aggregation.secure_aggregation.server_state import SecureSum, ServerState, Stage

MOST_BYTES = 1 << 34


@dataclass(frozen=True, slots=True)
class Members:
    """Stand-ins for enrolled identities: a secret for each name, and HMAC-SHA256 as signature.

    What is checked is the protocol; which signature scheme devices have is not its concern.
    """

    secrets: Mapping[str, bytes]

    @classmethod
    def enrol(cls, names: Sequence[str]) -> Members:
        """A fresh secret for each."""
        return cls({name: secrets.token_bytes(32) for name in names})

    def signer(self, name: str) -> keys.Signer:
        """Signs as that member."""
        return lambda message: hmac.digest(self.secrets[name], message, "sha256")

    def verify(self, name: str, message: bytes, signature: bytes) -> bool:
        """False for names that are not enrolled."""
        return name in self.secrets and hmac.compare_digest(
            hmac.digest(self.secrets[name], message, "sha256"), signature
        )


@dataclass(slots=True)
class Room:
    """The clients of one attempt, their states as bytes between any two messages, and all that
    was said."""

    members: Members
    devices: dict[str, client.Device]
    vectors: Mapping[str, np.ndarray]
    states: dict[str, bytes] = field(default_factory=dict)
    told: list[tuple[str, bytes]] = field(default_factory=list)
    heard: list[tuple[str, bytes]] = field(default_factory=list)
    refusals: list[tuple[str, Refusal]] = field(default_factory=list)

    def tell(self, name: str, message: bytes) -> bytes | Refusal:
        """One message to one client, whose process ends before and after."""
        self.told.append((name, message))
        state = from_bytes(self.states[name]) if name in self.states else None
        values = self.vectors[name] if client.wants_values(state, message) else None
        after, answer = client.advance(state, message, self.devices[name], values)
        if after is not None:
            self.states[name] = to_bytes(after)
        if isinstance(answer, Refusal):
            self.refusals.append((name, answer))
        else:
            self.heard.append((name, answer))
        return answer


def task_for(values: int, bits: int, *, round: int = 1) -> Task:
    """A task with a nonce of its own."""
    return Task(
        job=hashlib.sha256(b"job").digest(),
        round=round,
        nonce=secrets.token_bytes(16),
        plan=hashlib.sha256(b"plan and model").digest(),
        values=values,
        bits=bits,
    )


def names_of(count: int) -> list[str]:
    """Names in ascending order."""
    return [f"client-{number:04d}" for number in range(count)]


def room_for(
    names: Sequence[str], task: Task, terms: Terms, vectors: Mapping[str, np.ndarray]
) -> Room:
    """A room in which everybody was sent the same plan."""
    members = Members.enrol(names)
    devices = {
        name: client.Device(
            name=name, task=task, terms=terms, sign=members.signer(name), verify=members.verify
        )
        for name in names
    }
    return Room(members=members, devices=devices, vectors=vectors)


def random_vectors(
    names: Sequence[str], task: Task, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Uniform over the whole modulus, so that every sum wraps around."""
    kind = word_type(task.bits)
    return {
        name: rng.integers(0, 1 << task.bits, task.values, np.uint64).astype(kind) for name in names
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """How an attempt ended; `faults` are answers that the server did not take."""

    outcome: SecureSum | Aborted
    state: ServerState
    room: Room
    faults: tuple[Fault, ...]


def play(room: Room, context: Context, *, lost: Mapping[str, Stage] | None = None) -> Played:
    """An honest server's attempt. `lost` names the stage from which on a client is silent."""
    lost = lost or {}
    state, out = server.open_attempt(context)
    faults: list[Fault] = []
    while True:
        for name, message in out.items():
            if lost.get(name, Stage.OVER) <= state.stage:
                continue
            answer = room.tell(name, message)
            if isinstance(answer, bytes):
                state, fault = server.receive(state, name, answer, room.members.verify)
                faults += [fault] if fault else []
        state, result = server.close_stage(state)
        if isinstance(result, SecureSum | Aborted):
            return Played(outcome=result, state=state, room=room, faults=tuple(faults))
        out = result


def plain_sum(vectors: Mapping[str, np.ndarray], names: Sequence[str], bits: int) -> np.ndarray:
    """What the secure sum has to be, in integers of 64 bits."""
    total = sum((vectors[name].astype(np.uint64) for name in names), np.uint64(0))
    return (total % np.uint64(1 << bits)).astype(word_type(bits))


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """All that a server can work out from what it was told in one attempt."""

    both: tuple[str, ...]  # clients of whom it has seed and mask key
    sums: tuple[frozenset[str], ...]  # sets of clients the sum of whose vectors it has
    gave_both: tuple[str, ...]  # clients that gave shares of both kinds of one peer


def learned(room: Room, context: Context) -> Learned:
    """Puts together everything that was revealed, whoever revealed it and why.

    Masks whose key is known are taken away; clients with a mask between them whose key is not are
    known as one sum at most, and that only with the seeds of all. Every such sum is compared with
    the true one: a set is named only if the numbers are right.
    """
    attempt, names, bits = context.digest(), context.names, context.task.bits
    advertised: dict[int, Advertisement] = {}
    commitments: dict[int, bytes] = {}
    masked: dict[int, np.ndarray] = {}
    shares: dict[tuple[int, str], dict[int, int]] = {}
    for name, blob in room.heard:
        place, message = names.index(name), decode(blob, max_bytes=MOST_BYTES)
        if message.attempt != attempt:
            continue
        match message:
            case Advertisement():
                advertised[place] = message
            case SealedShares():
                commitments[place] = message.commitment
            case MaskedInput():
                masked[place] = unpack(message.payload, context.task.values, bits)
            case Reveal():
                for kind, given in (("seed", message.seeds), ("key", message.mask_keys)):
                    for owner, share in given:
                        shares.setdefault((owner, kind), {})[place] = share
    towards: dict[int, set[int]] = {place: set() for place in masked}
    for name, blob in room.told:
        message = decode(blob, max_bytes=MOST_BYTES)
        if isinstance(message, PeerShares) and names.index(name) in towards:
            towards[names.index(name)] |= {peer for peer, _ in message.sealed}

    seeds: dict[int, bytes] = {}
    mask_keys: dict[int, bytes] = {}
    for (owner, kind), found in shares.items():
        if len(found) < context.threshold:
            continue
        number = shamir.reconstruct(
            {holder + 1: share for holder, share in found.items()}, threshold=context.threshold
        )
        if number >> 256:
            continue
        secret = number.to_bytes(32, "little")
        if kind == "seed":
            expected = keys.commitment(secret, attempt=attempt, name=names[owner])
            if commitments.get(owner) == expected:
                seeds[owner] = secret
        elif keys.public_of(secret) == advertised[owner].mask_key:
            mask_keys[owner] = secret

    bare = {place: vector.copy() for place, vector in masked.items()}
    linked: dict[int, set[int]] = {place: {place} for place in masked}
    hidden: set[int] = set()
    for place, vector in bare.items():
        if place in seeds:
            subtract_mask(
                vector, keys.self_mask_key(seeds[place], attempt=attempt, name=names[place])
            )
        for peer in towards[place]:
            secret, public = mask_keys.get(place), advertised[peer].mask_key
            if secret is None:
                secret, public = mask_keys.get(peer), advertised[place].mask_key
            if secret is not None:
                key = keys.pair_mask_key(
                    keys.agree(secret, public), attempt=attempt, one=names[place], other=names[peer]
                )
                (subtract_mask if place < peer else add_mask)(vector, key)
            elif peer in masked and place in towards[peer]:
                linked[place].add(peer)
            else:
                hidden.add(place)  # a mask that nothing cancels
    sums = []
    for group in _groups(linked):
        if group <= set(seeds) and not group & hidden:
            total = sum((bare[place] for place in group), np.zeros_like(bare[min(group)]))
            reduce(total, bits)
            who = [names[place] for place in sorted(group)]
            if np.array_equal(total, plain_sum(room.vectors, who, bits)):
                sums.append(frozenset(who))
    gave = {
        names[holder]
        for (owner, kind), found in shares.items()
        for holder in found
        if kind == "seed" and holder in shares.get((owner, "key"), {})
    }
    return Learned(
        both=tuple(names[place] for place in sorted(set(seeds) & set(mask_keys))),
        sums=tuple(sums),
        gave_both=tuple(sorted(gave)),
    )


def _groups(linked: Mapping[int, set[int]]) -> list[set[int]]:
    """Connected pieces."""
    left, groups = set(linked), []
    while left:
        group: set[int] = set()
        ahead = {min(left)}
        while ahead:
            group |= ahead
            ahead = set().union(*(linked[place] for place in ahead)) - group
        groups.append(group)
        left -= group
    return groups


def below_threshold(context: Context) -> int:
    """The fewest clients to lose after which some secret has too few holders left."""
    return context.degree - context.threshold + 1


def with_plan(device: client.Device, plan: bytes) -> client.Device:
    """The device after another plan was sent to it."""
    return replace(device, task=replace(device.task, plan=plan))


def attempt_with(
    count: int,
    *,
    values: int,
    bits: int,
    terms: Terms,
    rng: np.random.Generator,
) -> tuple[Room, Context]:
    """A room of so many clients with random vectors, and an honest announcement for it."""
    names = names_of(count)
    task = task_for(values, bits)
    room = room_for(names, task, terms, random_vectors(names, task, rng))
    return room, new_context(task, names, terms)
