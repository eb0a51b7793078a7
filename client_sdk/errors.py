# SPDX-License-Identifier: Apache-2.0
"""The errors of this package.

ClientError
├── ConditionsError  what the device's owner asks for before it works cannot be read
├── CoordinatorUnreachableError  nobody answers there, or not as a coordinator does
│   ├── ClockError              the device's clock is so far off that nobody can be trusted by it
│   └── CoordinatorStatusError  it answers, but not with what was asked for; `.status` says how
├── DataError        the device's own data cannot be read, or do not fit the bundle
├── DeniedError      the coordinator does not let this device in (any more)
├── FetchError       a job's bundle cannot be had from the coordinator
├── FunctionError    a function of the device's own code cannot be found
├── IdentityError    the device's key, certificate or folder cannot be used, or an answer not taken
│   ├── IdentityChangedError  the coordinator is not the one that the device enrolled with
│   └── RefusedError          the coordinator refused to enrol or renew; `.code` says why
├── MemoryFileError  what the client keeps between rounds cannot be read or written
├── NotNowError      the conditions under which the device works do not hold
├── OutboxError      an update cannot be kept, or differs from the one that was
├── PlanError        a plan that this client will not follow
├── RunningError     another process runs the device, or its SuperNode cannot be started
├── SettingsError    what the device's owner set cannot be read, or cannot be meant
├── SplitError       the server that holds a network's body refused, or could not be reached
├── SumError         a message of a secure sum that this client refuses, or cannot answer
└── TrainingError    the trainer gave something that is no update
"""

from __future__ import annotations

from collections.abc import Sequence

from protocol.enrolment import Refusal, RefusalCode


class ClientError(Exception):
    """Everything that this package raises on purpose."""


class ConditionsError(ClientError):
    """Settings that say when the device works cannot be meant."""


class CoordinatorUnreachableError(ClientError):
    """Nobody answers at the coordinator's address, or not as a coordinator does."""


class ClockError(CoordinatorUnreachableError):
    """The device's clock and the coordinator's differ by more than signatures and TLS allow."""


class CoordinatorStatusError(CoordinatorUnreachableError):
    """The coordinator answers, but not with what was asked for."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status  # of HTTP


class DataError(ClientError):
    """The device's own data cannot be read, or do not fit the bundle.

    `faults` are all that were found, one sentence each.
    """

    def __init__(self, *faults: str, about: str = "") -> None:
        self.faults: Sequence[str] = faults
        if about and len(faults) > 1:
            super().__init__("\n".join((f"{about}: {len(faults)} faults", *map(_item, faults))))
        else:
            super().__init__(": ".join(filter(None, (about, *faults))))


def _item(fault: str) -> str:
    return f"  - {fault}"


class DeniedError(ClientError):
    """The coordinator does not let this device in: it is no member, or was revoked."""


class FetchError(ClientError):
    """A job's bundle cannot be had: it does not come, is another's, or has no room here."""


class FunctionError(ClientError):
    """An address "module:function" leads nowhere."""


class IdentityError(ClientError):
    """The device's key, certificate or folder cannot be used, or an answer cannot be taken."""


class IdentityChangedError(IdentityError):
    """The coordinator's authority or signing key is another than the one that was pinned."""


class RefusedError(IdentityError):
    """The coordinator refused to enrol this device, or to renew its certificate."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(f"the coordinator refused: {refusal}")
        self.code: RefusalCode = refusal.code


class MemoryFileError(ClientError):
    """A file that the client keeps between rounds cannot be read or written."""


class NotNowError(ClientError):
    """The conditions that the device's owner set do not hold at the moment."""


class OutboxError(ClientError):
    """An update cannot be kept, or is another than the one that was kept for its plan."""


class PlanError(ClientError):
    """The plan is not for this client, this job, or cannot be read."""


class RunningError(ClientError):
    """Another process runs the device already, or its SuperNode cannot be started."""


class SettingsError(ClientError):
    """What the device's owner set cannot be read, or cannot be meant."""


class SplitError(ClientError):
    """The server that holds the body refused a message, broke off, or could not be reached."""


class SumError(ClientError):
    """A message of a secure sum that this client refuses, or cannot answer."""


class TrainingError(ClientError):
    """What was trained does not fit the job's ParamSpec, or is not finite."""
