# SPDX-License-Identifier: Apache-2.0
"""The errors of this package.

ClientError
├── ConditionsError  what the device's owner asks for before it works cannot be read
├── CoordinatorUnreachableError  nobody answers there, or not as a coordinator does
├── DataError        the device's own data cannot be read, or do not fit the bundle
├── FunctionError    a function of the device's own code cannot be found
├── IdentityError    the device's key, certificate or folder cannot be used, or an answer not taken
│   ├── IdentityChangedError  the coordinator is not the one that the device enrolled with
│   └── RefusedError          the coordinator refused to enrol or renew; `.code` says why
├── MemoryFileError  what the client keeps between rounds cannot be read or written
├── OutboxError      an update cannot be kept, or differs from the one that was
├── PlanError        a plan that this client will not follow
├── SplitError       the server that holds a network's body refused, or could not be reached
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


class OutboxError(ClientError):
    """An update cannot be kept, or is another than the one that was kept for its plan."""


class PlanError(ClientError):
    """The plan is not for this client, this job, or cannot be read."""


class SplitError(ClientError):
    """The server that holds the body refused a message, broke off, or could not be reached."""


class TrainingError(ClientError):
    """What was trained does not fit the job's ParamSpec, or is not finite."""
