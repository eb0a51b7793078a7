# SPDX-License-Identifier: Apache-2.0
"""What a client of a secure sum brings along, and what it knows between any two messages.

Each state holds no more than the stages to come can need: secrets go as soon as they have served.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from aggregation.secure_aggregation.context import Context, Task, Terms
from aggregation.secure_aggregation.keys import KeyPair, Signer, Verifier
from aggregation.secure_aggregation.outcomes import Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What a client brings along: who it is, and what it knows without this server's word."""

    name: str
    task: Task  # from the plan that it was sent, with that plan's own hash
    terms: Terms  # from the signed job
    sign: Signer
    verify: Verifier


class PeerPublic(NamedTuple):
    """A neighbour's keys of this attempt."""

    sealing: bytes
    mask: bytes


class Held(NamedTuple):
    """A client's shares of one neighbour's secrets."""

    mask_key: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Advertised:
    """Keys are out."""

    context: Context
    sealing: KeyPair
    mask: KeyPair
    request: bytes  # SHA-256 of the message that led here
    reply: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """Shares are out."""

    context: Context
    sealing_secret: bytes = field(repr=False)
    mask_secret: bytes = field(repr=False)
    seed: bytes = field(repr=False)
    peers: Mapping[int, PeerPublic]
    request: bytes
    reply: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Masked:
    """The vector is out; `peers` are those towards whom it is masked."""

    context: Context
    mask_secret: bytes = field(repr=False)
    seed: bytes = field(repr=False)
    peers: Mapping[int, bytes]  # their public mask keys
    held: Mapping[int, Held] = field(repr=False)
    request: bytes
    sent: bytes  # SHA-256 of the masked vector


@dataclass(frozen=True, slots=True, kw_only=True)
class Consented:
    """A list is signed; of secrets, only peers' shares are left."""

    context: Context
    peers: tuple[int, ...]
    held: Mapping[int, Held] = field(repr=False)
    members: tuple[int, ...]
    request: bytes
    reply: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Revealed:
    """Done; no secret is left but those that the reply has given away."""

    attempt: bytes
    request: bytes
    reply: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """Refused; no secret is left."""

    attempt: bytes
    reason: Reason


ClientState = Advertised | Shared | Masked | Consented | Revealed | Ended
