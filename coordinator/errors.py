# SPDX-License-Identifier: Apache-2.0
"""The errors of this package.

    CoordinatorError
    ├── JobError              the job file is wrong; holds every fault that was found
    ├── JournalError          the journal cannot be used
    │   ├── JournalFormatError    it was written by another version, or is no journal
    │   └── JournalConflictError  it holds another round, or other tensors, than this run has
    ├── DeploymentError       the deployment's folder or settings are missing or wrong
    ├── EnrolmentError        enrolment cannot be set up or used
    │   ├── AuthorityError        the authority's key or certificate is missing or unusable
    │   └── RegistryError         the registry cannot be used, or lacks an entry
    ├── NoClientsError        there is nobody to send a round to
    ├── JobStoppedError       the operator wants a job no more
    ├── GatewayError          the gateway cannot be started as it is set
    ├── RefusedError          a request from the network that is answered by a refusal
    ├── SuperLinkError        a command of Flower's failed
    └── SupervisorError       a process cannot be kept running

What a client does wrong is none of these: it becomes a `protocol.rejection.Rejection`, or a
`protocol.enrolment.Refusal`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class CoordinatorError(Exception):
    """Everything that this package raises on purpose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that is wrong in a job: which key, what it holds, what it may hold."""

    key: str
    value: object
    allowed: str
    line: int | None = None

    def __str__(self) -> str:
        where = "" if self.line is None else f"line {self.line}: "
        return f"{where}{self.key} = {_shown(self.value)}: {self.allowed}"


class JobError(CoordinatorError, ValueError):
    """A job that cannot be run; `faults` lists everything found wrong, not the first only."""

    def __init__(self, faults: Sequence[Fault], *, source: str = "") -> None:
        self.faults = tuple(faults)
        self.source = source
        head = f"{source}: " if source else ""
        super().__init__("\n".join(f"{head}{fault}" for fault in self.faults))


class JournalError(CoordinatorError):
    """The journal cannot be opened or used."""


class JournalFormatError(JournalError):
    """The file is no journal, or one of another version."""


class JournalConflictError(JournalError):
    """The journal holds something else than the run that wants to continue it."""


class DeploymentError(CoordinatorError):
    """A deployment's folder or settings are missing, in the way, or not as they must be."""


class EnrolmentError(CoordinatorError):
    """Enrolment cannot be set up or used, by no fault of a device."""


class AuthorityError(EnrolmentError):
    """The authority's key or certificate is missing, in the way, or not as it must be."""


class RegistryError(EnrolmentError):
    """The registry of tokens and devices is another file, cannot be written, or lacks an entry."""


class NoClientsError(CoordinatorError):
    """The link to the clients knows of none."""


class JobStoppedError(CoordinatorError):
    """The operator wants the job no more; what its journal holds stays."""


class GatewayError(CoordinatorError):
    """The gateway's settings, certificate or ports are not as they must be."""


class RefusedError(CoordinatorError):
    """Why a request is refused, in words for whoever asked, and the HTTP status that says so.

    `again_s`: seconds after which it is worth asking again; 0: nothing is known about that.
    """

    def __init__(self, reason: str, *, status: int, again_s: float = 0.0) -> None:
        self.status = status
        self.again_s = again_s
        super().__init__(reason)


class SuperLinkError(CoordinatorError):
    """Flower's SuperLink, or a command that asks it for something, failed."""


class SupervisorError(CoordinatorError):
    """A process of the deployment does not stay alive, or its folder cannot be used."""


def _shown(value: object) -> str:
    """A value as TOML would write it, shortened: job files may hold anything."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{...}"
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
