# SPDX-License-Identifier: Apache-2.0
"""A client's fault as a value: what was wrong with its answer, under a code that stays."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from protocol.limits import MAX_CLIENT_LENGTH, MAX_REASON_LENGTH


class RejectionCode(StrEnum):
    """Why an answer was not merged. Codes are never renumbered; new ones are added at the end."""

    TRUNCATED = "E201"  # ends before its own lengths or its ParamSpec say
    TOO_LONG = "E202"  # more bytes than the budget, its own lengths or its ParamSpec allow
    WRONG_SPEC = "E203"  # names, shapes or dtypes are not the job's
    NOT_FINITE = "E204"  # NaN or infinite values, or scales that decode to them
    WRONG_JOB = "E205"
    WRONG_ROUND = "E206"
    WRONG_NONCE = "E207"  # answers another attempt of the same round
    BAD_WEIGHT = "E208"  # sample count outside what is allowed
    WRONG_CODEC = "E209"
    CLIENT_FAILED = "E210"  # the client reported an error in place of an update
    MALFORMED = "E211"  # not an update container, or a header that cannot be read
    WRONG_VERSION = "E212"
    CORRUPTED = "E213"  # checksum differs: changed on the way
    WRONG_CLIENT = "E214"  # names another client than the one that was asked
    NO_REPLY = "E215"  # nothing came before the round's deadline
    DUPLICATE = "E216"  # this attempt's update has been counted before
    LATE = "E217"  # nothing came before the round had its quorum, or before its end
    REVOKED = "E218"  # the device was revoked, or left, before its answer was merged
    NOT_SUMMED = "E219"  # the client was lost in a secure sum, or what it sent there was wrong


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """One answer that was left out of a round; the round itself goes on.

    `client` and `reason` may quote what a hostile client sent, so they are cut to a bounded length
    and stripped of control characters here, once, before any log or report shows them.
    """

    client: str
    round: int
    code: RejectionCode
    reason: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "client", displayable(self.client, MAX_CLIENT_LENGTH))
        object.__setattr__(self, "reason", displayable(self.reason, MAX_REASON_LENGTH))
        object.__setattr__(self, "code", RejectionCode(self.code))

    def __str__(self) -> str:
        return (
            f"client {self.client}: {self.reason}; "
            f"update rejected, round {self.round} continues ({self.code})"
        )


def displayable(text: str, limit: int) -> str:
    """At most `limit` characters, none of which steers a terminal."""
    cut = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in cut)
