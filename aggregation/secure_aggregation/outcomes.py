# SPDX-License-Identifier: Apache-2.0
"""How a secure sum ends otherwise than with a sum. All of these are values: none is raised."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Reason(StrEnum):
    """Why a client refuses, why a server leaves a client out, why it gives an attempt up."""

    MALFORMED = "malformed"  # bytes that are no message, or fields that cannot be
    OTHER_ATTEMPT = "other-attempt"  # a message of another round, nonce, plan or list
    OUT_OF_ORDER = "out-of-order"  # a message of a stage that is over or has not come
    CONTRADICTION = "contradiction"  # a message again, with other content
    ENDED = "ended"  # a message to whoever has left the attempt
    UNKNOWN_CLIENT = "unknown-client"  # a name or place that is no participant, or no neighbour
    WRONG_TASK = "wrong-task"  # not the job, round, plan, length or modulus that the device knows
    WEAK_TERMS = "weak-terms"  # a threshold of half or less, or a graph or floor below the job's
    OTHER_PLAN = "other-plan"  # a peer signed its keys for another plan or list than ours
    FORGED_KEYS = "forged-keys"  # a signature of keys that is not the peer's
    WEAK_KEY = "weak-key"  # a public key that agrees on the same secret with everybody
    TOO_FEW_PEERS = "too-few-peers"  # fewer neighbours than the threshold
    TOO_FEW_SURVIVORS = "too-few-survivors"  # fewer than the job's floor in all
    DECLARED_DEAD = "declared-dead"  # the client itself is not on the list
    FORGED_CONSENT = "forged-consent"  # a signature of the list that is not the peer's
    CHANGED_VALUES = "changed-values"  # another vector where one was sent: masks serve once
    FALSE_SHARES = "false-shares"  # shares that do not give what their owner committed to


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A client's answer in place of a message. `final`: its secrets are gone, the attempt is over
    for it; otherwise its state is as it was, and the message that was due may still come."""

    reason: Reason
    detail: str
    final: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A message that a server did not take. `dropped`: its sender is out of this attempt."""

    name: str
    reason: Reason
    detail: str
    dropped: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Aborted:
    """An attempt that gives no sum; `names` are those concerned, if any are."""

    reason: Reason
    detail: str
    names: tuple[str, ...] = ()
